"""Sparse: the few entries of a weight that codes cannot hold, added to what the codes decode to.

Compressed sparse rows: float16 values, their columns, and where each row begins. A stored value is the weight minus
what its code decodes to, so that the sum needs no mask (SpQR, arXiv 2306.03078; SqueezeLLM, arXiv 2306.07629).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dither.errors import ShapeError, SpecError

SHORT = 1 << 16  # columns of a matrix that 16 bits can number
TensorLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Sparse:
    """Values [n] of an [o, i] matrix at `columns` [n]; row r holds entries row_offsets[r] … row_offsets[r + 1] - 1."""

    values: Float[Tensor, " n"]
    columns: Int[Tensor, " n"]
    row_offsets: Int[Tensor, " rows"]
    shape: tuple[int, int]

    @classmethod
    def of(cls, dense: Float[Tensor, "o i"], mask: Bool[Tensor, "o i"]) -> "Sparse":
        """The entries of `dense` where `mask` is set, rounded to float16.

        Raises:
            SpecError: a value does not fit into float16.
        """
        rows, columns = mask.nonzero(as_tuple=True)
        values = dense[rows, columns].to(torch.float16)
        if not bool(values.isfinite().all()):
            raise SpecError(f"an outlier of {float(dense[rows, columns].abs().amax()):.4g} does not fit into float16")
        offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        offsets[1:] = mask.sum(dim=1).cumsum(0)
        return cls(values, columns.to(torch.int32), offsets, (mask.shape[0], mask.shape[1]))

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The matrix, zero where nothing is stored."""
        out = torch.zeros(self.shape, dtype=dtype, device=self.values.device)
        out[self.rows(), self.columns.long()] = self.values.to(dtype)
        return out

    def rows(self) -> Int[Tensor, " n"]:
        """The row of each entry."""
        index = torch.arange(self.shape[0], device=self.values.device)
        return torch.repeat_interleave(index, self.row_offsets.diff().long(), output_size=self.columns.shape[0])

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.values.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk: values, columns and row offsets."""
        return _nbytes(sparse_layout(self.count, self.shape))

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors by their short names; columns beyond 32,767 wrap around in 16 bits."""
        index = sparse_layout(self.count, self.shape)["outlier_columns"][1]
        columns = self.columns.to(index)
        return {
            "outliers": self.values.to(torch.float16),
            "outlier_columns": columns,
            "outlier_rows": self.row_offsets.to(torch.int32),
        }

    @classmethod
    def unpack(cls, parts: dict[str, Tensor], shape: tuple[int, int]) -> "Sparse":
        """The inverse of `pack`.

        Raises:
            ShapeError: rows or columns lie outside of the matrix.
        """
        columns, offsets = parts["outlier_columns"].to(torch.int32), parts["outlier_rows"]
        if parts["outlier_columns"].dtype == torch.int16:
            columns = columns & (SHORT - 1)
        return cls(parts["outliers"], columns, offsets, shape)

    def check(self) -> None:
        """Refuse offsets and columns that do not describe the matrix.

        Raises:
            ShapeError: rows do not add up to the entries, or a column lies outside.
        """
        offsets = self.row_offsets.long()
        whole = len(offsets) == self.shape[0] + 1 and int(offsets[0]) == 0 and int(offsets[-1]) == self.count
        if not whole or bool((offsets.diff() < 0).any()):
            raise ShapeError(f"sparse rows of a weight {self.shape} do not add up to {self.count} entries")
        if self.count and not 0 <= int(self.columns.min()) <= int(self.columns.max()) < self.shape[1]:
            raise ShapeError(f"a sparse column lies outside of a weight {self.shape}")


def sparse_layout(count: int, shape: tuple[int, int]) -> TensorLayout:
    """Shape and dtype of the stored tensors of `count` entries."""
    index = torch.int16 if shape[1] <= SHORT else torch.int32
    return {
        "outliers": ((count,), torch.float16),
        "outlier_columns": ((count,), index),
        "outlier_rows": ((shape[0] + 1,), torch.int32),
    }


def _nbytes(layout: TensorLayout) -> int:
    return sum(size[0] * dtype.itemsize for size, dtype in layout.values())
