"""Minimum and maximum of each channel."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.statistics.base import as_rows


@dataclass(frozen=True)
class MinMax:
    """Extremes per channel [d]; those of the whole tensor are their extremes."""

    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]

    @classmethod
    def of(cls, x: Float[Tensor, "*b d"]) -> "MinMax":
        """The statistic of one batch."""
        rows = as_rows(x)
        return cls(rows.amin(dim=0), rows.amax(dim=0))

    def merge(self, other: "MinMax") -> "MinMax":
        """Extremes over both."""
        return MinMax(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))
