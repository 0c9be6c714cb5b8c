"""What is tried and what came of it, as plain data that other processes and machines can be sent."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.tuning.space import Point, Value


@dataclass(frozen=True)
class Task:
    """One trial to run: a method's text with fields, how much calibration data, and the seed that draws them."""

    number: int
    configuration: dict[str, Value]
    method: str
    fields: dict[str, Any]
    samples: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a task measured: figures by name (`top1`, `size_bytes`, …), or the error that ended it."""

    number: int
    figures: dict[str, float | None] = field(default_factory=dict)
    error: str | None = None
    time_s: float = 0.0


RunTrials = Callable[[Sequence[Task]], Iterator[Outcome]]  # in any order; each task comes back once


@dataclass(frozen=True)
class Trial:
    """A point that was tried. `cost` is to be lowered, None if the trial failed; `violation` of limits is 0 if kept.

    Among equal costs the lower `tie` is better.
    """

    number: int
    point: Point
    cost: float | None
    violation: float = 0.0
    tie: float = 0.0

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """What trials are ordered by: those that kept the limits first, failures last."""
        return (self.cost is None, self.violation, self.cost if self.cost is not None else 0.0, self.tie)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial of lowest cost that kept the limits, the earliest among equals; None if none did."""
    kept = [trial for trial in trials if trial.cost is not None and trial.violation <= 0]
    return min(kept, key=lambda trial: (trial.rank, trial.number), default=None)


def penalized(trials: Sequence[Trial]) -> NDArray[np.float64]:
    """A cost for every trial, as a surrogate can fit it: what failed or broke a limit costs more than all else."""
    kept = [trial.cost for trial in trials if trial.cost is not None and trial.violation <= 0]
    low, high = (min(kept), max(kept)) if kept else (0.0, 0.0)
    step = (high - low) or 1.0
    costs = []
    for trial in trials:
        if trial.cost is None:
            costs.append(high + step)
        elif trial.violation > 0:
            costs.append(high + step * min(trial.violation, 1.0))
        else:
            costs.append(trial.cost)
    return np.array(costs, dtype=np.float64)
