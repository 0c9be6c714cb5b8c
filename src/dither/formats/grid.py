"""Uniform grids: real = scale * (code - zero_point), with one scale for each cell of a matrix.

A cell is where a row group meets a column group, so one class serves per tensor, per channel, groups along either
axis, and the dual grid of ERQ v2 (two column groups that interleave).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.second_level import SecondLevel
from dither.formats.spec import QuantSpec

RoundMode = Literal["nearest", "floor", "ceil"]
Columns = slice | Int[Tensor, " n"]
EVERY = slice(None)
_ROUND = {"nearest": torch.round, "floor": torch.floor, "ceil": torch.ceil}
_ROUND_IN_PLACE = {"nearest": torch.round_, "floor": torch.floor_, "ceil": torch.ceil_}


def highest_code(spec: QuantSpec) -> int:
    """The largest code of the grid."""
    return spec.levels - 1


def lowest_code(spec: QuantSpec) -> int:
    """The smallest code of the grid: 1 where a narrow symmetric grid (or a sign and magnitude) has none lower."""
    return 1 if spec.narrow or spec.kind == "mxint" else 0


def implied_zero_point(spec: QuantSpec) -> float:
    """The zero-point of symmetric and unsigned grids, which is not stored; between its two codes for 1 bit."""
    if spec.symmetry == "unsigned":
        return 0.0
    return float(2 ** (spec.bits - 1)) if spec.bits > 1 else 0.5


def rounded(steps: Float[Tensor, "*n"], mode: RoundMode) -> Float[Tensor, "*n"]:
    """Whole numbers: the nearest (even between two), the one below or the one above."""
    return _ROUND[mode](steps)


def encode(
    x: Float[Tensor, "*n"],
    scale: Float[Tensor, "*#n"],
    zero_point: Float[Tensor, "*#n"],
    spec: QuantSpec,
    mode: RoundMode = "nearest",
) -> Float[Tensor, "*n"]:
    """Codes as floats; a real zero-point is added before the rounding (SpQR, HQQ), an integer one after it."""
    rounder, steps = _ROUND_IN_PLACE[mode], x / scale  # fresh memory costs more than the arithmetic
    whole = spec.zero_point != "real" and spec.bits > 1
    codes = rounder(steps).add_(zero_point) if whole else rounder(steps.add_(zero_point))
    return codes.clamp_(lowest_code(spec), highest_code(spec))


def decode(
    codes: Float[Tensor, "*n"], scale: Float[Tensor, "*#n"], zero_point: Float[Tensor, "*#n"]
) -> Float[Tensor, "*n"]:
    """scale * (code - zero_point)."""
    return (codes - zero_point).mul_(scale)


@dataclass(frozen=True)
class Grid:
    """A fitted uniform grid of an [o, i] matrix.

    `scale` and `zero_point` are [R, C] floats. Row o uses row `row_of[o]` of them, column i column `column_of[i]`;
    None means row o uses row o (or the only one), and likewise for columns.
    """

    spec: QuantSpec
    scale: Float[Tensor, "R C"]
    zero_point: Float[Tensor, "R C"]
    row_of: Int[Tensor, " o"] | None = None
    column_of: Int[Tensor, " i"] | None = None
    scale_codes: SecondLevel | None = None  # what `scale` decodes from where the spec says sB.G
    zero_point_codes: SecondLevel | None = None

    def cells(self, columns: Columns = EVERY) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Scale and zero-point of the given columns, broadcastable against [o, n]."""
        scale, zero_point = self.scale, self.zero_point
        if self.column_of is not None:
            index = self.column_of[columns]
            scale, zero_point = scale[:, index], zero_point[:, index]
        elif scale.shape[1] > 1:
            scale, zero_point = scale[:, columns], zero_point[:, columns]
        if self.row_of is not None:
            scale, zero_point = scale[self.row_of], zero_point[self.row_of]
        return scale, zero_point

    def encode(self, x: Float[Tensor, "o n"], columns: Columns = EVERY, mode: RoundMode = "nearest") -> Tensor:
        """Codes (as floats) of the given columns of the matrix."""
        scale, zero_point = self.cells(columns)
        return encode(x, scale.to(x), zero_point.to(x), self.spec, mode)

    def decode(self, codes: Float[Tensor, "o n"], columns: Columns = EVERY) -> Float[Tensor, "o n"]:
        """Values of codes in the given columns."""
        scale, zero_point = self.cells(columns)
        return decode(codes, scale.to(codes), zero_point.to(codes))

    def round(
        self, x: Float[Tensor, "o n"], columns: Columns = EVERY, mode: RoundMode = "nearest"
    ) -> Float[Tensor, "o n"]:
        """The value on the grid that `mode` chooses for each entry."""
        scale, zero_point = (part.to(x) for part in self.cells(columns))
        return decode(encode(x, scale, zero_point, self.spec, mode), scale, zero_point)

    def codes(self, x: Float[Tensor, "o i"]) -> UInt8[Tensor, "o i"]:
        """Nearest codes of the whole matrix, ready for packing."""
        return self.encode(x).to(torch.uint8)


def column_index(spec: QuantSpec, columns: int, device: torch.device) -> Int[Tensor, " i"] | None:
    """Which group each column belongs to, for groups along the inputs; None where all or each column stands alone."""
    if spec.granularity != "group" or spec.group_along == "outputs":
        return None
    size = group_size(spec, columns)
    return torch.arange(columns, device=device) // size


def row_index(spec: QuantSpec, rows: int, device: torch.device) -> Int[Tensor, " o"] | None:
    """Which row of scales each output uses; None for one a row."""
    if spec.granularity == "group" and spec.group_along == "outputs":
        return torch.arange(rows, device=device) // group_size(spec, rows)
    return None


def group_size(spec: QuantSpec, length: int) -> int:
    """The group size, checked.

    Raises:
        ShapeError: it does not divide the axis.
    """
    size = spec.group_size or length
    if length % size:
        fitting = next(d for d in range(size, 0, -1) if length % d == 0)
        raise ShapeError(
            f"group size {size} of {spec} does not divide {length} {spec.group_along}; the next that does is g{fitting}"
        )
    return size


def grid_shape(spec: QuantSpec, rows: int, columns: int) -> tuple[int, int]:
    """[R, C]: how many scales a matrix of [rows, columns] has."""
    if spec.granularity == "tensor":
        return 1, 1
    if spec.granularity == "group":
        if spec.group_along == "outputs":
            return rows // group_size(spec, rows), columns
        return rows, columns // group_size(spec, columns) * (2 if spec.dual else 1)
    return rows, 2 if spec.dual else 1
