"""First and second moment of each channel, as plain sums."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.statistics.base import as_rows


@dataclass(frozen=True)
class Moments:
    """Sums of x and x² per channel [d] over `rows`, in float64."""

    total: Float[Tensor, " d"]
    square: Float[Tensor, " d"]
    rows: int

    @classmethod
    def of(cls, x: Float[Tensor, "*b d"]) -> "Moments":
        """The statistic of one batch."""
        rows = as_rows(x).double()
        return cls(rows.sum(dim=0), rows.square().sum(dim=0), rows.shape[0])

    def merge(self, other: "Moments") -> "Moments":
        """Sums over both."""
        return Moments(self.total + other.total, self.square + other.square, self.rows + other.rows)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """E[x]."""
        return self.total / self.rows

    @property
    def mean_square(self) -> Float[Tensor, " d"]:
        """E[x²]."""
        return self.square / self.rows

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """E[x²] - E[x]², not below 0."""
        return torch.clamp(self.mean_square - self.mean.square(), min=0)
