"""Gram matrices of a grouped convolution: one small one a group, as each group's outputs read inputs of their own."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows

_ELEMENTS = 2**24  # of a product's factors in float64 at a time


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
        step = max(1, _ELEMENTS // max(1, len(seen) * width))
        parts = []
        for first in range(0, groups, step):
            columns = slice(first * width, (first + step) * width)
            left = _by_group(seen[:, columns], width, ones)
            right = left if original is None else _by_group(true[:, columns], width, ones)
            gram = left.mT @ left
            parts.append((gram, gram, gram) if original is None else (gram, left.mT @ right, right.mT @ right))
        joined = [torch.cat([part[place] for part in parts]) for place in range(3)]
        return cls(joined[0], joined[1], joined[2], len(seen))

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
