"""Gram matrices of a layer's inputs: all that ridge regression, GPTQ and rounding refinement know of the data."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows


@dataclass(frozen=True)
class Gram:
    """Plain sums over `rows` inputs, with a column of ones appended when the layer has a bias (k = i + 1).

    `quantized` is ÂᵀÂ of the inputs that the quantized layer sees, `original` AᵀA of the full-precision inputs and
    `cross` ÂᵀA. Where the inputs do not differ, all three are one tensor.
    """

    quantized: Float[Tensor, "k k"]
    cross: Float[Tensor, "k k"]
    original: Float[Tensor, "k k"]
    rows: int

    @classmethod
    def of(
        cls,
        quantized: Float[Tensor, "*b i"],
        original: Float[Tensor, "*b i"] | None = None,
        ones: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> "Gram":
        """The statistic of one batch: inputs as the quantized layer sees them and, where they differ, the originals."""
        seen = _with_ones(as_rows(quantized).to(dtype), ones)
        gram = seen.T @ seen
        if original is None:
            return cls(gram, gram, gram, seen.shape[0])
        true = _with_ones(as_rows(original).to(dtype), ones)
        return cls(gram, seen.T @ true, true.T @ true, seen.shape[0])

    def merge(self, other: "Gram") -> "Gram":
        """Sums over both."""
        if self.quantized.shape != other.quantized.shape:
            raise ShapeError(f"merging Grams of {self.quantized.shape[0]} and {other.quantized.shape[0]} columns")
        rows, quantized = self.rows + other.rows, self.quantized + other.quantized
        if self.cross is self.quantized and other.cross is other.quantized:
            return Gram(quantized, quantized, quantized, rows)
        return Gram(quantized, self.cross + other.cross, self.original + other.original, rows)

    def output_error(self, weight: Float[Tensor, "o k"], stored: Float[Tensor, "o k"]) -> float:
        """‖A Wᵀ - Â Ŵᵀ‖² / ‖A Wᵀ‖² of a weight and what is stored for it, bias columns included."""
        true, rounded = weight.to(self.quantized), stored.to(self.quantized)
        power = ((true @ self.original) * true).sum()
        difference = power - 2 * ((rounded @ self.cross) * true).sum() + ((rounded @ self.quantized) * rounded).sum()
        return float(difference.clamp_min(0) / power) if float(power) > 0 else 0.0


def _with_ones(rows: Float[Tensor, "n i"], ones: bool) -> Float[Tensor, "n k"]:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1) if ones else rows
