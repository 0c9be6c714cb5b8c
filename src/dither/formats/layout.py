"""Layout: which tensors a stored weight consists of, so that a file can be read without its maker."""

from dataclasses import dataclass
from math import prod

import torch

from dither.formats.grid import grid_shape
from dither.formats.low_rank import FactorType, low_rank_layout
from dither.formats.packing import packed_width
from dither.formats.ranges import scale_dtype
from dither.formats.sparse import TensorLayout, sparse_layout
from dither.formats.spec import QuantSpec


@dataclass(frozen=True)
class Layout:
    """A weight [o, i] in a format, with so many outliers and a correction of such (rank, dtype); None for neither."""

    spec: QuantSpec
    shape: tuple[int, int]
    outliers: int | None = None
    low_rank: tuple[int, FactorType] | None = None

    def tensors(self) -> TensorLayout:
        """Shape and dtype of each stored tensor by its short name.

        Raises:
            ShapeError: a group size does not divide.
        """
        spec, (rows, columns) = self.spec, self.shape
        parts: TensorLayout = {"codes": ((rows, packed_width(columns, spec.bits)), torch.uint8)}
        parts |= _grid_layout(spec, grid_shape(spec, rows, columns))
        if spec.dual:
            parts["column_set"] = ((packed_width(columns, 1),), torch.uint8)
        if self.outliers is not None:
            parts |= sparse_layout(self.outliers, self.shape)
        if self.low_rank is not None:
            parts |= low_rank_layout(*self.low_rank, self.shape)
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes on disk, everything counted."""
        return sum(prod(size) * dtype.itemsize for size, dtype in self.tensors().values())


def _grid_layout(spec: QuantSpec, cells: tuple[int, int]) -> TensorLayout:
    if spec.kind == "nuq":
        return {"levels": ((*cells, spec.levels), scale_dtype(spec))}
    parts: TensorLayout = {"scale": (cells, torch.uint8 if spec.kind == "mxint" else scale_dtype(spec))}
    if not spec.stores_zero_point:
        return parts
    if spec.zero_point == "real":
        parts["zero_point"] = (cells, scale_dtype(spec))
    elif packs_zero_point(spec):
        parts["zero_point"] = ((cells[0], packed_width(cells[1], spec.bits)), torch.uint8)
    else:
        parts["zero_point"] = (cells, torch.int32)
    return parts


def packs_zero_point(spec: QuantSpec) -> bool:
    """Whether zero-points are codes themselves and are packed like them."""
    return spec.zero_point == "clamped" or (spec.zero_point == "integer" and spec.include_zero)
