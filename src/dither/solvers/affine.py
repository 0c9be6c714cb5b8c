"""Grids of least weighted squared error: codes and straight lines through them in turns, or the better sign.

Every cell is a row's share of a group of columns (or the whole row). `importance` weighs columns, as the mean square of
their inputs does for the layer's output. The scale may be negative: a symmetric grid has one code more below zero than
above, and its sign says on which side of zero that code lies.

Source: signed scales are AutoRound's (released code of Cheng et al., arXiv 2309.05516); the turns are Lloyd's algorithm
with levels on a line [choice].
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import SpecError
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid, grid_of_ranges
from dither.formats.grid import Grid, column_index, decode, encode, group_size, highest_code, implied_zero_point
from dither.formats.ranges import affine, stored_scale
from dither.formats.spec import QuantSpec

SHRINKS = (1.0, 0.85, 0.7, 0.55)  # of the extremes' range, where the turns begin
AT_ONCE = 2**20  # entries whose grids are fitted together; bounds the memory
TURNS = 6  # measured: the error of normal weights falls by less than 1 % after these
SIGNED_SHRINKS = tuple(1 - 0.05 * step for step in range(10))


def fit_affine(weight: Float[Tensor, "o i"], spec: QuantSpec, importance: Float[Tensor, " i"] | None = None) -> Grid:
    """The asymmetric grid of least error: codes for a scale and offset, then these by least squares, and again.

    Raises:
        SpecError: the format is symmetric, or its cells are not rows or groups along the inputs.
        ShapeError: a group size does not divide.
    """
    if spec.kind != "int" or spec.symmetry != "asym":
        raise SpecError(f"{spec}: only an asymmetric grid has an offset to fit")
    cells, weigh = _cells(weight, spec, importance)
    shape = cells.shape[:2]
    rows = cells.flatten(0, 1).split(max(1, AT_ONCE // cells.shape[2]))
    weighs = weigh.expand_as(cells).flatten(0, 1).split(max(1, AT_ONCE // cells.shape[2]))
    found = [_least(part, own, spec) for part, own in zip(rows, weighs, strict=True)]
    low, high = (torch.cat(ends).reshape(shape) for ends in zip(*found, strict=True))
    return grid_of_ranges(low, high, spec, None, column_index(spec, weight.shape[1], weight.device))


def _least(cells: Float[Tensor, "n m"], weigh: Float[Tensor, "n m"], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The ends of each cell's best grid; all beginnings take their turns together, as few large steps are fast."""
    top = highest_code(spec)
    first, last = cells.amin(dim=1, keepdim=True), cells.amax(dim=1, keepdim=True)
    shrinks = torch.tensor(SHRINKS, dtype=cells.dtype, device=cells.device)[:, None, None]
    middle, half = (first + last) / 2, (last - first) / 2 * shrinks
    low, scale = middle - half, (2 * half / top).clamp_min(torch.finfo(cells.dtype).tiny)
    seen = []
    for turn in range(TURNS + 1):
        if turn in (0, TURNS):
            seen.append((_error(cells, low, low + top * scale, spec, weigh), low, low + top * scale))
        if turn < TURNS:
            low, scale = _line(((cells - low) / scale).round_().clamp_(0, top), cells, weigh, scale)
    error, low, high = (torch.stack(parts, dim=1).flatten(0, 1)[..., 0] for parts in zip(*seen, strict=True))
    best = error.argmin(dim=0, keepdim=True)
    return low.gather(0, best)[0], high.gather(0, best)[0]


def _error(
    cells: Float[Tensor, "n m"],
    low: Float[Tensor, "c n 1"],
    high: Float[Tensor, "c n 1"],
    spec: QuantSpec,
    weigh: Float[Tensor, "n m"],
) -> Float[Tensor, "c n 1"]:
    """Of every cell on the grids of some ranges, with scale and zero-point as they are stored."""
    scale, zero_point = (part.reshape(low.shape) for part in affine(low.flatten(), high.flatten(), spec))
    value = decode(encode(cells.expand(len(low), -1, -1), scale, zero_point, spec), scale, zero_point)
    return (value.sub_(cells).square_() * weigh).sum(dim=-1, keepdim=True)


def fit_signed(
    weight: Float[Tensor, "o i"], spec: QuantSpec, importance: Float[Tensor, " i"] | None = None, search: bool = True
) -> Grid:
    """The symmetric grid whose extra code lies on the side of the larger extreme, or where `search` finds less error.

    Without `search` the larger extreme is the extra code.

    Raises:
        SpecError: the format is not symmetric with all codes and free scales, or its cells are not of the inputs.
        ShapeError: a group size does not divide.
    """
    if not can_be_signed(spec):
        raise SpecError(f"{spec}: signed scales go with symmetric codes that use all levels, as in int3:g64:sym")
    cells, weigh = _cells(weight, spec, importance)
    low, high = cells.amin(dim=2).clamp(max=0), cells.amax(dim=2).clamp(min=0)
    zero, top = implied_zero_point(spec), highest_code(spec)
    largest = torch.maximum(high, -low) / zero
    toward = torch.where(high > -low, -1.0, 1.0)
    best, found = torch.full_like(largest, torch.inf), largest
    for shrink in SIGNED_SHRINKS if search else (1.0,):
        size = stored_scale(largest * shrink, spec)
        for scale in (size * toward, -size * toward) if search else (size * toward,):
            steps = (cells / scale[:, :, None]).round_().clamp_(-zero, top - zero).mul_(scale[:, :, None])
            error = (steps.sub_(cells).square_() * weigh).sum(dim=2)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, scale, found)
    place = column_index(spec, weight.shape[1], weight.device)
    return Grid(spec, found, torch.full_like(found, zero), None, place)


def fit_least_squares(
    weight: Float[Tensor, "o i"], spec: QuantSpec, importance: Float[Tensor, " i"] | None = None
) -> Grid | Codebook:
    """`fit_affine` or `fit_signed`, whichever the format allows, else what its own search of ranges finds."""
    if spec.kind == "int" and spec.symmetry == "asym" and has_own_cells(spec):
        return fit_affine(weight, spec, importance)
    return fit_signed(weight, spec, importance) if can_be_signed(spec) else fit_grid(weight, spec, importance)


def has_own_cells(spec: QuantSpec) -> bool:
    """Whether every cell is a row, or a row's share of a group of inputs."""
    return spec.granularity in ("group", "channel") and spec.group_along == "inputs" and not spec.dual


def can_be_signed(spec: QuantSpec) -> bool:
    """Whether the sign of a scale has something to say, and room to be stored."""
    free = not (spec.narrow or spec.power_of_two) and spec.second_level is None and spec.bits > 1
    return spec.kind == "int" and spec.symmetry == "sym" and free and has_own_cells(spec)


def _cells(weight: Tensor, spec: QuantSpec, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [o, C, m] and the weighing of their columns [1, C, m], of mean one and nowhere zero."""
    if not has_own_cells(spec):
        raise SpecError(f"{spec}: cells are rows, or groups along the inputs, as in int3:g64")
    columns = weight.shape[1]
    size = group_size(spec, columns)
    weigh = weight.new_ones(columns) if importance is None else importance.to(weight)
    weigh = weigh / weigh.mean().clamp_min(torch.finfo(weight.dtype).tiny) + 1e-6  # a dead group still has a range
    return weight.reshape(weight.shape[0], -1, size), weigh.reshape(1, -1, size)


def _line(
    codes: Float[Tensor, "c n m"],
    cells: Float[Tensor, "n m"],
    weigh: Float[Tensor, "n m"],
    scale: Float[Tensor, "c n 1"],
) -> tuple[Float[Tensor, "c n 1"], Float[Tensor, "c n 1"]]:
    """Offset and scale of least weighted squared error for given codes; cells of one code keep their scale."""
    total = weigh.sum(dim=-1, keepdim=True)
    code, cell = ((weigh * part).sum(dim=-1, keepdim=True) / total for part in (codes, cells))
    apart = codes - code
    weighed = weigh * apart
    spread = (weighed * apart).sum(dim=-1, keepdim=True)
    together = (weighed * (cells - cell)).sum(dim=-1, keepdim=True)
    scale = torch.where((spread > 0) & (together > 0), together / spread.clamp_min(1e-30), scale)
    return cell - scale * code, scale
