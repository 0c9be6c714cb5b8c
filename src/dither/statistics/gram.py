"""Gram matrices of a layer's inputs: all that ridge regression, GPTQ and rounding refinement need to know of the data."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows


@dataclass(frozen=True)
class Gram:
    """Plain sums over `rows` inputs, with a column of ones appended when the layer has a bias (k = i + 1).

    `quantized` is ÂᵀÂ of the inputs the quantized layer sees, `cross` is ÂᵀA against the full-precision inputs.
    A method that does not quantize activations has `cross` equal to `quantized`.
    """

    quantized: Float[Tensor, "k k"]
    cross: Float[Tensor, "k k"]
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
            return cls(gram, gram, seen.shape[0])
        true = _with_ones(as_rows(original).to(dtype), ones)
        return cls(gram, seen.T @ true, seen.shape[0])

    def merge(self, other: Self) -> "Gram":
        """Sums over both."""
        if self.quantized.shape != other.quantized.shape:
            raise ShapeError(f"merging Grams of {self.quantized.shape[0]} and {other.quantized.shape[0]} columns")
        same = self.cross is self.quantized and other.cross is other.quantized
        quantized = self.quantized + other.quantized
        return Gram(quantized, quantized if same else self.cross + other.cross, self.rows + other.rows)


def _with_ones(rows: Float[Tensor, "n i"], ones: bool) -> Float[Tensor, "n k"]:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1) if ones else rows
