"""What a method may do to a whole network before the walk, and what it says about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dither.models.anatomy import Anatomy


@dataclass(frozen=True)
class Subject:
    """A full-precision network that may be changed in place, with the data that it is calibrated on.

    `run` calls it on a batch. Names of modules must stay.
    """

    model: nn.Module
    anatomy: Anatomy
    run: Callable[[Any], Any]
    batches: Sequence[Any]
    progress: Callable[[str, int, int], None] | None = None

    def say(self, what: str, done: int, total: int) -> None:
        """Tell whoever watches."""
        if self.progress is not None:
            self.progress(what, done, total)


@dataclass(frozen=True)
class Prepared:
    """Weight formats chosen for layers by name, remarks on modules, and facts by their names in the report."""

    formats: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
