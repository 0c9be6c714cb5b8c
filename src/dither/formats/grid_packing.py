"""Grids and codebooks as stored tensors, and back."""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.codebook import Codebook
from dither.formats.grid import Grid, column_index, highest_code, implied_zero_point, row_index
from dither.formats.layout import Layout, packs_zero_point
from dither.formats.mixed import MixedGrid
from dither.formats.packing import pack, unpack
from dither.formats.ranges import EXPONENT_BIAS, scale_dtype
from dither.formats.second_level import SecondLevel
from dither.formats.spec import QuantSpec

_BYTE = 255


def pack_grid(grid: Grid | Codebook | MixedGrid, layout: Layout) -> dict[str, Tensor]:
    """Scales or levels, zero-points, which columns belong together and how wide they are, by their short names.

    Raises:
        ShapeError: the format quantizes its scales, but the grid was made without their codes.
    """
    if isinstance(grid, MixedGrid):
        return {"column_top": grid.top, **pack_grid(grid.base, layout)}
    spec, parts = grid.spec, {}
    if spec.dual and grid.column_of is not None:
        parts["column_set"] = pack((grid.column_of % 2).to(torch.uint8)[None], bits=1)[0]
    if layout.regrouped and grid.column_of is not None:
        groups = grid.column_of // 2 if spec.dual else grid.column_of
        parts["group_index"] = groups.to(layout.tensors()["group_index"][1])
    if spec.kind == "nuq" and isinstance(grid, Codebook):
        return parts | {"levels": grid.levels.to(scale_dtype(spec))}
    if spec.kind == "mxint":
        exponent = torch.frexp(grid.scale).exponent - 1 + spec.bits - 2
        return parts | {"scale": (exponent + EXPONENT_BIAS).to(torch.uint8)}
    parts |= _pack_statistic("scale", grid.scale, grid.scale_codes, spec)
    if spec.stores_zero_point and isinstance(grid, Grid):
        parts |= _pack_zero_point(grid, spec)
    return parts


def is_regrouped(grid: Grid | Codebook | MixedGrid) -> bool:
    """Whether the columns of a group do not lie side by side."""
    grid = grid.base if isinstance(grid, MixedGrid) else grid
    if grid.spec.granularity != "group" or grid.column_of is None:
        return False
    side_by_side = column_index(grid.spec, grid.column_of.shape[0], grid.column_of.device)
    groups = grid.column_of // 2 if grid.spec.dual else grid.column_of
    return side_by_side is None or not torch.equal(groups.to(side_by_side), side_by_side)


def unpack_grid(parts: dict[str, Tensor], layout: Layout) -> Grid | Codebook | MixedGrid:
    """The inverse of `pack_grid`."""
    spec, device, (rows, columns) = layout.spec, parts["codes"].device, layout.shape
    row_of, column_of = row_index(spec, rows, device), column_index(spec, columns, device)
    if layout.regrouped:
        column_of = parts["group_index"].long()  # 16 bits wrap around beyond 32,767
        column_of = column_of & (_BYTE if parts["group_index"].dtype == torch.uint8 else (1 << 16) - 1)
    if spec.dual:
        half = unpack(parts["column_set"][None], bits=1, count=columns)[0].long()
        column_of = half if column_of is None else column_of * 2 + half
    if spec.kind == "nuq":
        return Codebook.of_levels(spec, parts["levels"].float(), row_of, column_of)
    if spec.kind == "mxint":
        exponent = parts["scale"].int() - EXPONENT_BIAS - (spec.bits - 2)
        scale, scale_codes = torch.ldexp(torch.ones(exponent.shape, device=device), exponent), None
    else:
        scale, scale_codes = _unpack_statistic("scale", parts, layout)
    if spec.is_codebook:
        return Codebook.of_scale(spec, scale, row_of, column_of, scale_codes)
    zero_point, zero_point_codes = torch.full_like(scale, implied_zero_point(spec)), None
    if spec.stores_zero_point:
        zero_point, zero_point_codes = _unpack_zero_point(parts, layout)
    grid = Grid(spec, scale, zero_point, row_of, column_of, scale_codes, zero_point_codes)
    return MixedGrid(grid, parts["column_top"]) if spec.kind == "mix" else grid


def _pack_statistic(
    name: str, values: Float[Tensor, "R C"], codes: SecondLevel | None, spec: QuantSpec
) -> dict[str, Tensor]:
    if spec.scale_bits is None:
        return {name: values.to(scale_dtype(spec))}
    if codes is None:
        raise ShapeError(f"{spec}: a grid that quantizes its {name} must bring the codes of it, as fit_grid makes them")
    return {
        name: pack(codes.codes, spec.scale_bits),
        f"{name}_step": codes.step.half(),
        f"{name}_offset": codes.offset.half(),
    }


def _unpack_statistic(
    name: str, parts: dict[str, Tensor], layout: Layout
) -> tuple[Float[Tensor, "R C"], SecondLevel | None]:
    spec = layout.spec
    if spec.second_level is None:
        return parts[name].float(), None
    bits, size = spec.second_level
    step, offset = parts[f"{name}_step"].float(), parts[f"{name}_offset"].float()
    codes = SecondLevel(unpack(parts[name], bits, step.shape[1]), step, offset, size)
    return codes.decode(), codes


def _pack_zero_point(grid: Grid, spec: QuantSpec) -> dict[str, Tensor]:
    if spec.zero_point == "real":
        return _pack_statistic("zero_point", grid.zero_point, grid.zero_point_codes, spec)
    if not packs_zero_point(spec):
        return {"zero_point": grid.zero_point.to(torch.int32)}
    return {"zero_point": pack(grid.zero_point.clamp(0, highest_code(spec)).to(torch.uint8), spec.bits)}


def _unpack_zero_point(parts: dict[str, Tensor], layout: Layout) -> tuple[Float[Tensor, "R C"], SecondLevel | None]:
    if layout.spec.zero_point == "real":
        return _unpack_statistic("zero_point", parts, layout)
    if not packs_zero_point(layout.spec):
        return parts["zero_point"].float(), None
    return unpack(parts["zero_point"], layout.spec.bits, layout.cells[1]).float(), None
