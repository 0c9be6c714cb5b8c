"""Tasks of EleutherAI's lm-eval, run by its own harness on a network in memory: an extra, imported where it is used.

Its data come from the model hub unless they are there already; a folder of task files (YAML, as lm-eval defines them)
adds tasks of one's own, which may read local files.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dither.errors import DependencyError, InputError, nearest
from dither.evaluation.exam import need_tokenizer
from dither.models.network import Network
from dither.nn.linear import cache_weights

BATCH = 8  # texts at a time
_COUNTS = ("sample_len", "samples")  # what some versions list among a task's figures


@dataclass(frozen=True)
class TaskFigure:
    """One figure of one task; `reference` is the full-precision network's, where that was asked too."""

    task: str
    metric: str
    value: float
    stderr: float | None
    count: int | None
    reference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows, and how many examples of each are asked (all by default)."""

    names: tuple[str, ...]
    manager: Any
    count: int | None = None


def open_tasks(names: Sequence[str], folder: str | Path | None = None, count: int | None = None) -> Tasks:
    """Look up tasks, before any model is read; `folder` holds task files of one's own.

    Raises:
        DependencyError: lm-eval is not installed.
        InputError: a task or the folder does not exist.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DependencyError(f"tasks are run by lm-eval, install dither[lm-eval] ({error})") from error
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"task folder {str(folder)!r} does not exist")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        near = nearest(unknown[0], manager.all_tasks)
        raise InputError(f"lm-eval has no task {unknown[0]!r}{near}; give the folder of your own with --task-folder")
    return Tasks(tuple(names), manager, count)


def run_tasks(network: Network, tasks: Tasks, reference: Network | None = None) -> list[TaskFigure]:
    """The figures of the tasks, beside those of a reference network; global seeds stay as they are.

    Raises:
        InputError: a task's data cannot be had, or the network is no transformers language model.
    """
    rows = _figures(_evaluated(network, tasks))
    if reference is None:
        return rows
    whole = {(one.task, one.metric): one.value for one in _figures(_evaluated(reference, tasks))}
    return [replace(one, reference=whole.get((one.task, one.metric))) for one in rows]


def _evaluated(network: Network, tasks: Tasks) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = need_tokenizer(network)
    if not hasattr(network.model, "generate") or not hasattr(network.model, "config"):
        raise InputError(f"lm-eval needs a language model of transformers, got {type(network.model).__name__}")
    cache_weights(network.model)
    try:
        with _random_states_kept():  # it seeds, and some tasks draw
            harness = HFLM(pretrained=network.model, tokenizer=tokenizer, batch_size=BATCH)
            found = simple_evaluate(
                model=harness, tasks=list(tasks.names), task_manager=tasks.manager, limit=tasks.count,
                log_samples=False, bootstrap_iters=0,
                random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:  # data that cannot be had, a tokenizer without an end
        raise InputError(f"lm-eval cannot run {', '.join(tasks.names)}: {error}") from error
    finally:
        cache_weights(network.model, cached=False)
    return dict(found)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The process's own generators go on as if nothing had happened."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _figures(found: Mapping[str, Any]) -> list[TaskFigure]:
    """lm-eval names figures `metric,filter`, and their errors `metric_stderr,filter`."""
    rows = []
    for task, figures in found["results"].items():
        sizes = found.get("n-samples", {}).get(task, {})
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric in _COUNTS:
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind in ("", "none") else f"{metric} ({kind})"
            stderr = float(error) if isinstance(error, int | float) else None
            rows.append(TaskFigure(task, name, float(value), stderr, sizes.get("effective")))
    return rows
