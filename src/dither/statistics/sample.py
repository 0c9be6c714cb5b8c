"""A bounded sample of rows, from which percentiles and range searches are taken.

While the rows fit, the sample is all of them. Beyond that the rows with the smallest hash of their own contents stay.
Which those are depends neither on their order nor on how they were split, so merging is exact and nothing is random;
equal rows stay or go together.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows
from dither.statistics.extremes import MinMax

SAMPLE_VALUES = 2**22  # 16 MiB of float32 a tensor; 32 pictures of ViT-S at 224 pixels have 2.4 M values a layer
_MULTIPLIER, _MODULUS = 1_000_003, 2**31 - 1


@dataclass(frozen=True)
class RowSample:
    """At most `capacity` rows [n, d] and the true extremes of everything seen."""

    rows: Float[Tensor, "n d"]
    extremes: MinMax
    capacity: int

    @classmethod
    def of(cls, x: Float[Tensor, "*b d"], values: int = SAMPLE_VALUES) -> "RowSample":
        """The sample of one batch, of at most `values` numbers but at least 256 rows."""
        rows = as_rows(x)
        capacity = max(256, values // rows.shape[1])
        kept = _smallest_hashes(rows, capacity)
        # a view would change, or vanish, with the activations that it was taken from
        kept = kept.clone() if kept.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else kept
        return cls(kept, MinMax.of(rows), capacity)

    def merge(self, other: "RowSample") -> "RowSample":
        """The sample of both, as large as the smaller capacity allows."""
        if self.rows.shape[1] != other.rows.shape[1]:
            raise ShapeError(f"merging samples of {self.rows.shape[1]} and {other.rows.shape[1]} columns")
        rows, capacity = torch.cat([self.rows, other.rows]), min(self.capacity, other.capacity)
        return RowSample(_smallest_hashes(rows, capacity), self.extremes.merge(other.extremes), capacity)


def _smallest_hashes(rows: Float[Tensor, "n d"], capacity: int) -> Float[Tensor, "m d"]:
    if rows.shape[0] <= capacity:
        return rows
    order = torch.argsort(_hash(rows), stable=True)
    return rows[order[:capacity]]


def _hash(rows: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """A polynomial hash of each row's float32 bits; integer arithmetic, so exact on every device."""
    bits = rows.float().contiguous().view(torch.int32).long() % _MODULUS
    value = torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
    for column in range(rows.shape[1]):
        value = (value * _MULTIPLIER + bits[:, column]) % _MODULUS
    return value * 48271 % _MODULUS
