"""Random search: configurations drawn without replacement. The baseline that a search has to beat."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from dither.tuning.strategy import Strategy


class RandomSearch(Strategy):
    """Points drawn from those that are left."""

    name: ClassVar[str] = "random"

    def choose(self, left: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
        """A draw without replacement."""
        return [left[int(k)] for k in generator.permutation(len(left))[:count]]
