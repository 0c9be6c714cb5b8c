"""Which engine runs the work: the one that was named, or torchrun's ranks where torchrun started this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from dither.engine.cluster import RayTasks
from dither.engine.local import Engine, InProcess, ProcessPool
from dither.engine.names import EngineName
from dither.engine.ranks import Ranks, started_by_torchrun
from dither.engine.team import ALONE, Team
from dither.errors import InputError


@contextmanager
def opened(
    engine: Engine | str, workers: int = 1, device: str | torch.device | None = None, ray_address: str | None = None
) -> Iterator[Engine]:
    """An engine while it is needed; one that is given, not named, is the caller's to close.

    `auto` is torchrun's ranks under torchrun, else this machine's processes: `workers` of them, this one alone for 1.
    Ray starts `workers` on this machine unless `ray_address` names a cluster.

    Raises:
        InputError: there is no such engine, or it does not fit how this process was started.
    """
    if not isinstance(engine, str):
        yield engine
        return
    if engine not in get_args(EngineName):
        raise InputError(f"engine {engine!r} is not known; choose one of {', '.join(get_args(EngineName))}")
    if started_by_torchrun() and engine in ("local", "ray"):
        raise InputError(f"engine {engine!r} under torchrun: every rank would do all the work; leave torchrun out")
    if ray_address is not None and engine != "ray":
        raise InputError(f"a Ray address needs --engine ray, not {engine!r}")
    if engine == "torchrun" or started_by_torchrun():
        if workers > 1:
            raise InputError("ranks solve layers themselves; give torchrun more of them instead of --workers")
        with Ranks(device) as ranks:
            yield ranks
    elif engine == "ray":
        gpus = int(device is not None and torch.device(device).type == "cuda")
        with RayTasks(ray_address, workers, gpus=gpus) as tasks:
            yield tasks
    elif workers > 1:
        with ProcessPool(workers) as pool:
            yield pool
    else:
        yield InProcess()


def team_of(engine: Engine) -> Team:
    """The processes that walk a model together with this one."""
    return engine if isinstance(engine, Team) else ALONE
