"""Gram matrices of a layer's inputs: all that ridge regression, GPTQ and rounding refinement know of the data."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows

TILE = 256  # measured on a CPU: 1,536 columns take two thirds of the time of one product


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
        """The statistic of one batch: inputs as the quantized layer sees them and, where they differ, the originals.

        `dtype` is that of the products within the batch; sums over batches are always in float64. Single precision
        will do where nothing is subtracted from the Gram, and is twice as fast.
        """
        if original is None:
            return cls._of_one(quantized, ones, dtype)
        seen = _with_ones(as_rows(quantized).to(dtype), ones)
        true = _with_ones(as_rows(original).to(dtype), ones)
        return cls(_squared(seen), (seen.T @ true).double(), _squared(true), seen.shape[0])

    @classmethod
    def _of_one(cls, x: Float[Tensor, "*b i"], ones: bool, dtype: torch.dtype) -> "Gram":
        rows = _with_ones(x.detach().reshape(-1, x.shape[-1]).to(dtype), ones)
        gram = _squared(rows)
        if not bool(gram.isfinite().all()):  # squares tell of NaN and Inf at less cost than every input
            rows = _with_ones(as_rows(x).double(), ones)
            gram = _squared(rows)
        return cls(gram, gram, gram, rows.shape[0])

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
        if self.cross is self.quantized:  # nothing is subtracted, so that single precision will do
            gram, single = self.original.float(), weight.float()
            change = stored.to(single) - single
            whole, error = (float(((x @ gram) * x).sum()) for x in (single, change))
            return max(error, 0.0) / whole if whole > 0 else 0.0
        true, rounded = weight.to(self.quantized), stored.to(self.quantized)
        power = ((true @ self.original) * true).sum()
        difference = power - 2 * ((rounded @ self.cross) * true).sum() + ((rounded @ self.quantized) * rounded).sum()
        return float(difference.clamp_min(0) / power) if float(power) > 0 else 0.0


def _squared(rows: Float[Tensor, "n k"]) -> Float[Tensor, "k k"]:
    """AᵀA in float64, products in the dtype of the rows; what lies below the diagonal is copied from above it."""
    columns = rows.shape[1]
    gram = rows.new_empty(columns, columns, dtype=torch.float64)
    for start in range(0, columns, TILE):
        stop = min(start + TILE, columns)
        product = rows[:, start:stop].T @ rows[:, start:]
        gram[start:stop, start:] = product
        gram[stop:, start:stop] = product[:, stop - start :].T
    return gram


def _with_ones(rows: Float[Tensor, "n i"], ones: bool) -> Float[Tensor, "n k"]:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1) if ones else rows
