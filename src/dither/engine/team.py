"""Processes that walk one model side by side, each with a share of the calibration batches: what they must settle.

A walk asks its team for its share, for statistics over everybody's batches, and for whatever has to be decided alike.
`Alone` is a team of one; `dither.engine.ranks` holds the team of torchrun's ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn


@runtime_checkable
class Mergeable(Protocol):
    """A statistic over some data."""

    def merge(self: "T", other: "T") -> "T":
        """A new statistic over both."""
        ...


T = TypeVar("T")
S = TypeVar("S", bound=Mergeable)
Parts = Iterable[tuple[str, S]]  # of one batch: names and statistics, made one by one as they are asked for


@runtime_checkable
class Team(Protocol):
    """What a walk needs of the processes beside it. All of them call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process; 0 decides and writes."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """Those of all batches that are this process's."""
        ...

    def merge(self, parts: Iterable[Parts[S]]) -> dict[str, S]:
        """Statistics over all batches of all processes, the same everywhere; `parts` are those of the own batches."""
        ...

    def agree(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides; the others wait for it. An error of rank 0 is raised everywhere."""
        ...

    def align_(self, module: nn.Module) -> None:
        """Give a module's tensors the values that they have on rank 0."""
        ...


class Alone:
    """A team of one process."""

    rank, size = 0, 1

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """All batches."""
        return batches

    def merge(self, parts: Iterable[Parts[S]]) -> dict[str, S]:
        """Statistics over all batches, merged one after the other in their order."""
        return merged(parts)

    def agree(self, decide: Callable[[], T]) -> T:
        """The decision."""
        return decide()

    def align_(self, module: nn.Module) -> None:
        """Nothing is to be done."""


ALONE = Alone()


def merged(parts: Iterable[Parts[S]]) -> dict[str, S]:
    """Statistics of the same name merged one after the other, in their order; each part is let go at once."""
    found: dict[str, S] = {}
    for batch in parts:
        for name, part in batch:
            found[name] = found[name].merge(part) if name in found else part
    return found
