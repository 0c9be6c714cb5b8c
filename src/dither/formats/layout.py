"""Layout: which tensors a stored weight consists of, so that a file can be read without its maker."""

from dataclasses import dataclass
from math import prod

import torch

from dither.formats.grid import grid_shape, group_size
from dither.formats.low_rank import FactorType, low_rank_layout
from dither.formats.packing import packed_width
from dither.formats.ranges import scale_dtype
from dither.formats.sparse import TensorLayout, sparse_layout
from dither.formats.spec import QuantSpec

_SHORT = 1 << 8  # groups of a row that 8 bits can number


@dataclass(frozen=True)
class Layout:
    """A weight [o, i] in a format, with so many outliers and a correction of such (rank, dtype); None for neither.

    `regrouped` says that the columns of a group do not lie side by side, so that each column's group is stored.
    `widths` counts the columns of 0 to 8 bits of a mixed format; None before they are known, when all are taken alike.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    outliers: int | None = None
    low_rank: tuple[int, FactorType] | None = None
    regrouped: bool = False
    widths: tuple[int, ...] | None = None

    @property
    def cells(self) -> tuple[int, int]:
        """[R, C]: how many scales, or tables of levels, the weight has."""
        return grid_shape(self.spec, *self.shape)

    def tensors(self) -> TensorLayout:
        """Shape and dtype of each stored tensor by its short name.

        Raises:
            ShapeError: a group size does not divide.
        """
        spec, (rows, columns) = self.spec, self.shape
        width = packed_width(columns, spec.bits)
        if self.widths is not None:  # columns of one width lie together
            width = sum(packed_width(count, bits) for bits, count in enumerate(self.widths))
        parts: TensorLayout = {"codes": ((rows, width), torch.uint8)}
        if spec.kind == "mix":
            parts["column_top"] = ((columns,), torch.uint8)
        parts |= _grid_layout(spec, self.cells)
        if spec.dual:
            parts["column_set"] = ((packed_width(columns, 1),), torch.uint8)
        if self.regrouped:
            short = columns // group_size(spec, columns) <= _SHORT
            parts["group_index"] = ((columns,), torch.uint8 if short else torch.int16)
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
    parts = _statistic_layout("scale", spec, cells)
    if not spec.stores_zero_point:
        return parts
    if spec.zero_point == "real":
        parts |= _statistic_layout("zero_point", spec, cells)
    elif packs_zero_point(spec):
        parts["zero_point"] = ((cells[0], packed_width(cells[1], spec.bits)), torch.uint8)
    else:
        parts["zero_point"] = (cells, torch.int32)
    return parts


def _statistic_layout(name: str, spec: QuantSpec, cells: tuple[int, int]) -> TensorLayout:
    """Scales or real zero-points, which may be stored in codes of their own."""
    if spec.kind == "mxint":
        return {name: (cells, torch.uint8)}
    if spec.second_level is None:
        return {name: (cells, scale_dtype(spec))}
    bits, size = spec.second_level
    groups = -(-cells[0] // size), cells[1]
    return {
        name: ((cells[0], packed_width(cells[1], bits)), torch.uint8),
        f"{name}_step": (groups, torch.float16),
        f"{name}_offset": (groups, torch.float16),
    }


def packs_zero_point(spec: QuantSpec) -> bool:
    """Whether zero-points are codes themselves and are packed like them."""
    return spec.zero_point == "clamped" or (spec.zero_point == "integer" and spec.include_zero)
