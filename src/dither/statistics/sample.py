"""A bounded sample of rows, from which percentiles and range searches are taken.

While the rows fit, the sample is all of them. Beyond that the rows with the smallest hash of their own contents stay.
Which those are depends neither on their order nor on how they were split, so merging is exact and nothing is random;
equal rows stay or go together.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows
from dither.statistics.extremes import MinMax

SAMPLE_VALUES = 2**22  # 16 MiB of float32 a tensor; 32 pictures of ViT-S at 224 pixels have 2.4 M values a layer
_MULTIPLIER, _MODULUS = 1_000_003, 2**31 - 1
_COLUMNS, _PART = 2**10, 2**18  # columns of an exact sum; values at a time, which stay in the cache


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
    """A polynomial hash of each row's float32 bits.

    The 32 bits are taken in parts of 11, so that products with the powers and their sums over `_COLUMNS` columns are
    whole numbers below 2^53: matrix products in float64 are exact then, on every device and in every order.
    """
    powers = torch.tensor(_powers(rows.shape[1]), dtype=torch.float64, device=rows.device)
    return torch.cat([_hash_part(part, powers) for part in rows.split(max(1, _PART // max(1, rows.shape[1])))])


def _hash_part(rows: Float[Tensor, "n d"], powers: Float[Tensor, " d"]) -> Int[Tensor, " n"]:
    bits, value = rows.float().contiguous().view(torch.int32), torch.zeros((), dtype=torch.long, device=rows.device)
    for columns, powered in zip(bits.split(_COLUMNS, dim=1), powers.split(_COLUMNS), strict=True):
        for shift, part in ((0, columns & 0x7FF), (11, (columns >> 11) & 0x7FF), (22, columns >> 22)):
            value = (value + ((part.double() @ powered).long() % _MODULUS << shift)) % _MODULUS
    return value * 48271 % _MODULUS


@cache
def _powers(count: int) -> tuple[int, ...]:
    """Of the multiplier, falling to its zeroth."""
    powers = [1]
    for _ in range(count - 1):
        powers.append(powers[-1] * _MULTIPLIER % _MODULUS)
    return tuple(reversed(powers))
