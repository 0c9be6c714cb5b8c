"""Gram matrices of a grouped convolution: one small one a group, as each group's outputs read inputs of their own."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows

_PART = 2**18  # values of a product's factors at a time, which stay in the cache


@dataclass(frozen=True)
class GroupedGram:
    """Plain sums over `rows` inputs for each of g groups, as `Gram` holds them for one: ÂᵀÂ, ÂᵀA and AᵀA."""

    quantized: Float[Tensor, "g k k"]
    cross: Float[Tensor, "g k k"]
    original: Float[Tensor, "g k k"]
    rows: int

    @classmethod
    def of(
        cls,
        quantized: Float[Tensor, "*b i"],
        groups: int,
        original: Float[Tensor, "*b i"] | None = None,
        ones: bool = False,
    ) -> "GroupedGram":
        """The statistic of one batch, whose columns hold the groups one after the other; products are in float64."""
        seen = as_rows(quantized)
        true = seen if original is None else as_rows(original)
        if seen.shape[1] % groups:
            raise ShapeError(f"{seen.shape[1]} columns are not those of {groups} groups")
        width = seen.shape[1] // groups
        step = max(1, _PART // max(1, seen.shape[1]))
        size = (1 if original is None else 3, groups, width + ones, width + ones)
        sums = seen.new_zeros(size, dtype=torch.float64)
        for first in range(0, len(seen), step):
            rows = slice(first, first + step)
            left = _by_group(seen[rows], width, ones)
            sums[0] += left.mT @ left
            if original is not None:
                right = _by_group(true[rows], width, ones)
                sums[1] += left.mT @ right
                sums[2] += right.mT @ right
        return cls(sums[0], sums[len(sums) // 2], sums[-1], len(seen))

    def merge(self, other: "GroupedGram") -> "GroupedGram":
        """Sums over both."""
        if self.quantized.shape != other.quantized.shape:
            raise ShapeError(f"merging Grams of {tuple(self.quantized.shape)} and {tuple(other.quantized.shape)}")
        return GroupedGram(
            self.quantized + other.quantized,
            self.cross + other.cross,
            self.original + other.original,
            self.rows + other.rows,
        )

    def without_bias(self, columns: int) -> "GroupedGram":
        """Of the first columns alone, which leaves out the ones appended for a bias."""
        on = (slice(None), slice(columns), slice(columns))
        return GroupedGram(self.quantized[on], self.cross[on], self.original[on], self.rows)

    def group_of(self, outputs: int) -> Int[Tensor, " o"]:
        """Which group each of the outputs belongs to."""
        groups = len(self.quantized)
        return torch.arange(outputs, device=self.quantized.device) * groups // outputs

    def output_error(self, weight: Float[Tensor, "o k"], stored: Float[Tensor, "o k"]) -> float:
        """‖A Wᵀ - Â Ŵᵀ‖² / ‖A Wᵀ‖² over all groups, bias columns included."""
        groups = len(self.quantized)
        true, found = (x.to(self.quantized).unflatten(0, (groups, -1)) for x in (weight, stored))
        power = ((true @ self.original) * true).sum()
        difference = power - 2 * ((found @ self.cross) * true).sum() + ((found @ self.quantized) * found).sum()
        return float(difference.clamp_min(0) / power) if float(power) > 0 else 0.0


def _by_group(rows: Float[Tensor, "n c"], width: int, ones: bool) -> Float[Tensor, "g n k"]:
    parts = rows.double().unflatten(1, (-1, width)).transpose(0, 1)
    return torch.cat([parts, parts.new_ones(*parts.shape[:2], 1)], dim=2) if ones else parts
