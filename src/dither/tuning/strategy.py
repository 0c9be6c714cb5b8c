"""Strategy: what to try next, given what was tried.

A strategy draws from a generator of its seed and the number of trials it was told, so that what it asks for follows
from seed and history alone: a run that was killed is gone on with by telling it the trials that were kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from dither.tuning.space import Point, Space
from dither.tuning.trial import Trial


class Strategy(ABC):
    """Asks for points of a space that were not tried yet, and is told what they cost."""

    name: ClassVar[str]

    def __init__(self, space: Space, seed: int = 0) -> None:
        self.space, self.seed = space, seed
        self.trials: list[Trial] = []

    def tell(self, trial: Trial) -> None:
        """Learn what a trial found."""
        self.trials.append(trial)

    def ask(self, count: int = 1) -> list[Point]:
        """Up to `count` different points, fewer where the space is exhausted; a larger answer begins with a smaller."""
        tried = {trial.point for trial in self.trials}
        left = [number for number, point in enumerate(self.space.points) if point not in tried]
        if not left:
            return []
        generator = np.random.default_rng([self.seed, len(self.trials)])
        return [self.space.points[number] for number in self.choose(left, min(count, len(left)), generator)]

    @abstractmethod
    def choose(self, left: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
        """`count` different ones of the points `left`, as numbers in the space; the first do not depend on `count`."""
