"""The engine of torchrun: ranks that walk one model together.

Every rank has the model. Calibration batches are dealt out in turn, statistics are merged, each layer is solved by one
rank and its solution sent to all, so that the finished block is the same everywhere; rank 0 alone writes.

On the CPU the result is that of one process with as many threads, bit for bit: parts of statistics are exchanged batch
by batch and merged in the order of the batches, which is the order of one process. On GPUs each rank merges its own
share first and the shares are then merged in the order of the ranks, which is one exchange a block instead of one a
batch: sums of float64 then differ in their last bits from those of one process, and a weight on the edge between two
codes may get the other one. The ranks among themselves agree to the bit there too.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from dither.engine.apart import Form, as_bytes, put_together, take_apart
from dither.engine.outcome import Failed, tried
from dither.engine.team import Parts, S, merged
from dither.errors import InputError

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=7)  # rank 0 may evaluate for hours meanwhile; torchrun itself notices ranks that die


def started_by_torchrun() -> bool:
    """Whether this process is one of several ranks."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


class Ranks:
    """An engine whose tasks are solved by their owners, and the team that these are. Use it in a `with` statement."""

    def __init__(self, device: str | torch.device | None = None) -> None:
        """`device` is cpu or cuda, where every rank of a machine has a GPU of its own; by default cuda if there is one.

        Raises:
            InputError: torchrun did not start this process, a certain GPU was asked for, or there are too few.
        """
        if "RANK" not in os.environ:
            raise InputError(
                "no ranks: torchrun did not start this process; use torchrun --nproc-per-node N -m dither …"
            )
        self.device = own_device(device)
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
        self.ordered = self.device.type == "cpu"  # whether parts are merged batch by batch
        self._open = ExitStack()

    def __enter__(self) -> "Ranks":
        if self.device.type == "cuda":
            self._open.enter_context(torch.cuda.device(self.device))
        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=PATIENCE)
            atexit.register(distributed.destroy_process_group)  # torchrun's store does not serve a second group
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # the others may wait in the middle of something; torchrun ends them
            atexit.unregister(distributed.destroy_process_group)
        self._open.close()

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """function(task) for each task, in order; each is run by one rank, all ranks get all results.

        All ranks must give the same tasks. A task's `cost`, where it has one, decides who owns it.
        """
        everything = list(tasks)
        owners = dealt([float(getattr(task, "cost", 1.0)) for task in everything], self.size)
        mine = {index: tried(function, everything[index]) for index, who in enumerate(owners) if who == self.rank}
        for index, owner in enumerate(owners):
            result = self.sent(mine.pop(index, None), owner)
            if isinstance(result, Failed):
                raise result.error
            yield result

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """Every `size`-th batch, from that of the own number on; none where there are fewer batches than ranks."""
        return list(batches)[self.rank :: self.size]

    def merge(self, parts: Iterable[Parts[S]]) -> dict[str, S]:
        """Statistics over all batches, the same on every rank."""
        own = iter(parts) if self.ordered else iter([merged(parts).items()])
        return merged(self._in_turn(own))

    def _in_turn(self, own: Iterator[Parts[S]]) -> Iterator[Parts[S]]:
        """The parts of all ranks, one batch of each in turn, until every rank has given all of its own."""
        while True:
            batch = next(own, None)
            found: list[tuple[str, S]] = [] if batch is None else list(batch)
            counts = [self.sent(None if batch is None else len(found), rank) for rank in range(self.size)]
            for rank, count in enumerate(counts):
                yield (self.sent(found.pop(0) if rank == self.rank else None, rank) for _ in range(count or 0))
            if not any(count is not None for count in counts):
                return

    def agree(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides; the others wait for it. An error of rank 0 is raised everywhere."""
        result: Any = self.sent(tried(lambda _: decide(), None) if self.rank == 0 else None, 0)
        if isinstance(result, Failed):
            raise result.error
        return result  # type: ignore[no-any-return]

    def align_(self, module: nn.Module) -> None:
        """Give a module's tensors the values that they have on rank 0."""
        for tensor in module.state_dict().values():
            tensor.copy_(self.sent(tensor, 0))

    def sent(self, value: Any, source: int) -> Any:
        """The value that rank `source` has; tensors arrive on a device of the kind that they were on there."""
        apart, tensors = take_apart(value) if self.rank == source else (None, [])
        message = [(apart, [Form.of(tensor) for tensor in tensors])]
        distributed.broadcast_object_list(message, source)
        if self.rank == source:
            for tensor in tensors:
                if tensor.numel():
                    distributed.broadcast(as_bytes(tensor), source)
            return value
        apart, forms = message[0]
        return put_together(apart, [self._received(form, source) for form in forms])

    def _received(self, form: Form, source: int) -> torch.Tensor:
        place = self.device if form.device == self.device.type else torch.device("cpu")
        data = torch.empty(form.nbytes, dtype=torch.uint8, device=place)
        if form.nbytes:
            distributed.broadcast(data, source)
        return form.tensor(data)


def own_device(asked: str | torch.device | None) -> torch.device:
    """This rank's device.

    Raises:
        InputError: a certain GPU was asked for, or the machine has fewer than ranks.
    """
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if ":" in str(device):
        raise InputError(f"{device} for every rank: each has a GPU of its own; say cuda, or set CUDA_VISIBLE_DEVICES")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise InputError(f"rank {number} of this machine has no GPU: there are {count}; use --nproc-per-node {count}")
    return torch.device("cuda", number)


def dealt(costs: Sequence[float], hands: int) -> list[int]:
    """Who gets which task, so that the most that anybody gets is small: the costliest first, to whoever has least."""
    loads, owners = [0.0] * hands, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owner = min(range(hands), key=lambda hand: (loads[hand], hand))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
