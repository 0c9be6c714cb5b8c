"""The engine of Ray: tasks on a cluster that runs already, or on workers of this machine.

A task whose worker dies is repeated elsewhere, so nothing is lost. A tensor that tasks share is put into the object
store once, and a function, which may hold a model, is unpickled once by each worker. Workers compute on one thread
each: on the CPU results are those of a process of one thread, bit for bit.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dither.engine.apart import Form, as_bytes, put_together, take_apart
from dither.engine.held import held
from dither.engine.outcome import Failed, tried
from dither.errors import DependencyError, InputError, WorkerError

T = TypeVar("T")
R = TypeVar("R")
RETRIES = 5  # of a task whose worker was lost


class RayTasks:
    """Runs tasks on Ray; functions must be importable by the workers, or picklable by value. Use it in a `with`."""

    def __init__(self, address: str | None = None, workers: int = 1, retries: int = RETRIES, gpus: int = 0) -> None:
        """`address` of a running cluster, `auto` for the one of this machine; None starts `workers` for the time.

        Each task has `gpus` GPUs; one that brings tensors from a GPU has one at least.

        Raises:
            DependencyError: Ray is not installed.
        """
        self.address, self.workers, self.retries, self.gpus = address, workers, retries, gpus
        self._ray, self._opened = _ray(), False

    def __enter__(self) -> "RayTasks":
        """Connect; a connection that the program has already is used and left open.

        Raises:
            InputError: there is no cluster at the address.
        """
        if self._ray.is_initialized():
            return self
        before = os.environ.get("RAY_USAGE_STATS_ENABLED")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to anybody
        local = {"address": "local", "num_cpus": max(1, self.workers), "include_dashboard": False}
        try:
            self._ray.init(
                **(local if self.address is None else {"address": self.address}),
                log_to_driver=False, logging_level=logging.ERROR,
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"no Ray cluster at {self.address!r}: {reason}; start one by `ray start --head`") from None
        finally:
            os.environ.pop("RAY_USAGE_STATS_ENABLED")
            if before is not None:
                os.environ["RAY_USAGE_STATS_ENABLED"] = before
        self._opened = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened:
            self._ray.shutdown()
            self._opened = False

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """function(task) for each task, in order; all run at once as far as there are workers.

        Raises:
            InputError: tasks need a GPU and the cluster has none, or workers have another software.
            WorkerError: workers died under a task again and again.
        """
        shipment = Shipment(self._ray)
        parcels = [shipment.parcel(task) for task in tasks]
        gpus = max(self.gpus, 0 if shipment.device is None else 1)
        if gpus and not self._ray.cluster_resources().get("GPU"):
            raise InputError("tasks need a GPU, but the Ray cluster has none; use --device cpu, or add a GPU node")
        remote = self._ray.remote(_run).options(max_retries=self.retries, num_cpus=1, num_gpus=gpus)
        shared = [self._ray.put((function, software()))]  # in a list Ray hands on the reference, not the value
        pending = [remote.remote(shared, rest, forms, *refs) for rest, forms, refs in parcels]
        try:
            for index in range(len(pending)):
                reference, pending[index] = pending[index], None
                yield self._result(reference, shipment)
        finally:
            for reference in pending:
                if reference is not None:
                    self._ray.cancel(reference)

    def _result(self, reference: Any, shipment: "Shipment") -> Any:
        try:
            rest, forms, data = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # outside of the function: its own errors come as results
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            raise WorkerError(
                f"a task lost its worker in each of {self.retries + 1} tries: {reason}; look at Ray's logs"
            ) from None
        result = put_together(rest, arrived(forms, data, shipment.device))
        if isinstance(result, Failed):
            raise result.error
        return result


@dataclass
class Shipment:
    """Tasks on their way: each tensor goes into the object store once."""

    ray: Any
    device: torch.device | None = None  # the GPU that tensors came from
    stored: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)  # the tensor too, so that ids stay its own

    def parcel(self, task: Any) -> tuple[Any, list[Form], list[Any]]:
        """What is left of a task without its tensors, their forms and their references."""
        rest, tensors = take_apart(task)
        for tensor in tensors:
            if tensor.device.type != "cpu":
                self.device = tensor.device
            if id(tensor) not in self.stored:
                self.stored[id(tensor)] = tensor, self.ray.put(packed(tensor))
        return rest, [Form.of(tensor) for tensor in tensors], [self.stored[id(tensor)][1] for tensor in tensors]


def _run(shared: Any, rest: Any, forms: list[Form], *data: Any) -> tuple[Any, list[Form], list[Any]]:
    """What a worker does: one task."""
    reference = shared[0]
    function, expected = held(reference.hex(), lambda: _ray().get(reference))
    found = software()
    if found != expected:
        raise InputError(f"a Ray worker has {found}, this process {expected}; install the same everywhere")
    device = None
    if any(form.device != "cpu" for form in forms):
        device = torch.device("cuda")
    torch.set_num_threads(1)
    with torch.no_grad():
        result, tensors = take_apart(tried(function, put_together(rest, arrived(forms, data, device))))
    return result, [Form.of(tensor) for tensor in tensors], [packed(tensor) for tensor in tensors]


def packed(tensor: Tensor) -> Any:
    """A tensor's bytes as an array, which Ray stores without another copy."""
    return as_bytes(tensor).cpu().numpy()


def arrived(forms: Sequence[Form], data: Sequence[Any], device: torch.device | None) -> list[Tensor]:
    """Tensors in memory of their own (the object store's is read-only), those of a GPU on `device`."""
    tensors = [form.tensor(torch.from_numpy(np.array(part))) for form, part in zip(forms, data, strict=True)]
    moved = zip(forms, tensors, strict=True)
    return [tensor if form.device == "cpu" or device is None else tensor.to(device) for form, tensor in moved]


def software() -> str:
    """The versions that decide a result."""
    return f"dither {version('dither')}, torch {torch.__version__}"


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise DependencyError(f"--engine ray needs Ray; install dither[ray] ({error})") from error
    return ray
