"""Mean magnitude of each channel, as plain sums."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dither.statistics.base import as_rows


@dataclass(frozen=True)
class Magnitude:
    """Sums of |x| per channel [d] over `rows`, in float64."""

    total: Float[Tensor, " d"]
    rows: int

    @classmethod
    def of(cls, x: Float[Tensor, "*b d"]) -> "Magnitude":
        """The statistic of one batch."""
        rows = as_rows(x).double()
        return cls(rows.abs().sum(dim=0), rows.shape[0])

    def merge(self, other: "Magnitude") -> "Magnitude":
        """Sums over both."""
        return Magnitude(self.total + other.total, self.rows + other.rows)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """E[|x|]."""
        return self.total / self.rows
