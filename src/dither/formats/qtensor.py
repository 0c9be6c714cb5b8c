"""QTensor: a weight as it is stored: codes on a grid, outliers and a correction, with its bytes counted honestly."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.codebook import Codebook
from dither.formats.grid import Grid
from dither.formats.grid_packing import is_regrouped, pack_grid, unpack_grid
from dither.formats.layout import Layout
from dither.formats.low_rank import LowRank
from dither.formats.mixed import MixedGrid, count_widths, pack_columns, unpack_columns
from dither.formats.packing import pack, unpack
from dither.formats.sparse import Sparse
from dither.formats.spec import QuantSpec


@dataclass(frozen=True)
class QTensor:
    """Codes [o, i] of at most 8 bits, the grid that gives them their values, and what is added to these."""

    codes: UInt8[Tensor, "o i"]
    grid: Grid | Codebook | MixedGrid
    sparse: Sparse | None = None
    low_rank: LowRank | None = None

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        return self.grid.spec

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def layout(self) -> Layout:
        """What its stored tensors look like."""
        outliers = None if self.sparse is None else self.sparse.count
        low_rank = None if self.low_rank is None else (self.low_rank.rank, self.low_rank.dtype)
        widths = count_widths(self.grid.top) if isinstance(self.grid, MixedGrid) else None
        return Layout(self.spec, self.shape, outliers, low_rank, is_regrouped(self.grid), widths)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The values that the codes stand for, plus outliers and correction; computed in float32."""
        dense = self.grid.decode(self.codes.float())
        if self.sparse is not None:
            dense = dense + self.sparse.dense()
        if self.low_rank is not None:
            dense = dense + self.low_rank.dense()
        return dense.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes, scales or levels, zero-points, column sets, outliers, correction."""
        return self.layout.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, everything included."""
        return 8 * self.nbytes / self.codes.numel()

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors by their short names; `layout` says their shapes."""
        if isinstance(self.grid, MixedGrid):
            codes = pack_columns(self.codes, self.grid.top)
        else:
            codes = pack(self.codes, self.spec.bits)
        parts = {"codes": codes, **pack_grid(self.grid, self.layout)}
        for extra in (self.sparse, self.low_rank):
            parts |= {} if extra is None else extra.pack()
        return parts

    @classmethod
    def unpack(cls, parts: dict[str, Tensor], layout: Layout) -> "QTensor":
        """The inverse of `pack`.

        Raises:
            ShapeError: a stored tensor is missing or has another shape than the layout says.
        """
        spec, shape = layout.spec, layout.shape
        for name, (size, dtype) in layout.tensors().items():
            if name not in parts or parts[name].shape != size or parts[name].dtype != dtype:
                found = f"{tuple(parts[name].shape)} {parts[name].dtype}" if name in parts else "nothing"
                raise ShapeError(f"stored {name} of {spec} for weight {shape}: expected {size} {dtype}, got {found}")
        sparse = None if layout.outliers is None else Sparse.unpack(parts, shape)
        low_rank = None if layout.low_rank is None else LowRank.unpack(parts, layout.low_rank[1])
        if layout.widths is None:
            codes = unpack(parts["codes"], spec.bits, shape[1])
        else:
            codes = unpack_columns(parts["codes"], parts["column_top"], layout.widths)
        return cls(codes, unpack_grid(parts, layout), sparse, low_rank)


def quantize(weight: Float[Tensor, "o i"], grid: Grid | Codebook | MixedGrid) -> QTensor:
    """Round a weight to its nearest codes; exact for a weight that lies on the grid."""
    return QTensor(grid.codes(weight), grid)
