"""Grid search: every configuration in the order of the space. A baseline, and exhaustive if there are trials enough."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from dither.tuning.strategy import Strategy


class GridSearch(Strategy):
    """The points in order, whatever was found; the seed changes nothing."""

    name: ClassVar[str] = "grid"

    def choose(self, left: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
        """The first ones."""
        return list(left[:count])
