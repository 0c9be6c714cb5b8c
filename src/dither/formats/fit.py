"""Fitting a grid, or the scales of a fixed codebook, to a weight matrix."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dither.errors import SpecError
from dither.formats.codebook import Codebook
from dither.formats.grid import Grid, column_index, grid_shape, group_size, row_index
from dither.formats.ranges import affine, opened, search_range, stored_scale, zero_points
from dither.formats.second_level import SecondLevel
from dither.formats.spec import QuantSpec

OUTLIER_PERCENTILE = 0.99  # ERQ v2 released code: 99th of the positive, 1st of the negative entries
OUTLIER_COLUMNS_PER_ROW = 20  # ERQ v2 released code: one outlier column for every 20 output rows


def fit_grid(
    weight: Float[Tensor, "o i"], spec: QuantSpec, importance: Float[Tensor, " i"] | None = None
) -> Grid | Codebook:
    """The grid (for nf4 and fp4 the codebook) of least error, as `spec.search` defines it, for a weight matrix.

    `importance` weighs the error in each column, as the mean square of its input does for the layer's output.

    Raises:
        SpecError: the format cannot hold a weight (token granularity, logarithmic codes), or its levels need a solver.
        ShapeError: a group size does not divide.
    """
    if spec.is_codebook:
        return fit_codebook(weight, spec)
    return fit_uniform(weight, spec, importance)


def fit_codebook(weight: Float[Tensor, "o i"], spec: QuantSpec) -> Codebook:
    """Fixed levels (nf4, fp4) scaled to the largest magnitude of each cell.

    Raises:
        SpecError: the levels themselves have to be fitted (nuq), or a scale does not fit into its storage dtype.
        ShapeError: a group size does not divide.
    """
    if spec.kind == "nuq":
        raise SpecError(f"{spec} needs a method that fits a codebook to the weights, such as squeezellm")
    rows, columns = weight.shape
    row_of, column_of = row_index(spec, rows, weight.device), column_index(spec, columns, weight.device)
    largest = as_cells(weight, spec).abs().amax(dim=1).reshape(grid_shape(spec, rows, columns))
    if spec.second_level is None:
        return Codebook.of_scale(spec, stored_scale(largest, spec), row_of, column_of)
    second = SecondLevel.of(largest, *spec.second_level, positive=True)
    return Codebook.of_scale(spec, second.decode(), row_of, column_of, second)


def fit_uniform(weight: Float[Tensor, "o i"], spec: QuantSpec, importance: Float[Tensor, " i"] | None = None) -> Grid:
    """As `fit_grid`, for those who count in steps: the format must be uniform.

    Raises:
        SpecError: the format is not uniform, or cannot hold a weight.
        ShapeError: a group size does not divide.
    """
    if spec.kind not in ("int", "mxint") or spec.granularity == "token":
        raise SpecError(f"weights need a uniform format per tensor, channel or group, got {spec}; try int{spec.bits}")
    importance = weight.new_ones(weight.shape[1]) if importance is None else importance.to(weight)
    importance = (
        importance + 1e-6 * importance.mean() + torch.finfo(weight.dtype).tiny
    )  # a dead group still has a range
    if spec.dual:
        return _fit_dual(weight, spec, importance)
    rows, columns = weight.shape
    cells, shape = as_cells(weight, spec), grid_shape(spec, rows, columns)
    weighed = as_cells(importance.expand(rows, columns), spec)
    low, high = (bound.reshape(shape) for bound in search_range(cells, spec, importance=weighed))
    device = weight.device
    return grid_of_ranges(low, high, spec, row_index(spec, rows, device), column_index(spec, columns, device))


def grid_of_ranges(
    low: Float[Tensor, "R C"],
    high: Float[Tensor, "R C"],
    spec: QuantSpec,
    row_of: Int[Tensor, " o"] | None = None,
    column_of: Int[Tensor, " i"] | None = None,
) -> Grid:
    """The grid whose cells cover these ranges; zero-points follow from the scales as they are stored.

    Raises:
        SpecError: a scale or a real zero-point is too large for its storage.
    """
    shape, ends = low.shape, (low.flatten(), high.flatten())
    if spec.second_level is None:
        scale, zero_point = (part.reshape(shape) for part in affine(*ends, spec))
        return Grid(spec, scale, zero_point, row_of, column_of)
    first = SecondLevel.of(affine(*ends, spec, stored=False)[0].reshape(shape), *spec.second_level, positive=True)
    scale, bottom = first.decode().to(low), opened(*ends, spec)[0].reshape(shape)
    if not spec.stores_zero_point or spec.zero_point != "real":
        return Grid(spec, scale, zero_points(bottom, scale, spec), row_of, column_of, first)
    second = SecondLevel.of(zero_points(bottom, scale, spec, stored=False), *spec.second_level, positive=False)
    return Grid(spec, scale, second.decode().to(low), row_of, column_of, first, second)


def as_cells(weight: Float[Tensor, "o i"], spec: QuantSpec) -> Float[Tensor, "n m"]:
    """The matrix as cells in the order of the grid's [R, C]."""
    rows, columns = weight.shape
    if spec.granularity == "tensor":
        return weight.reshape(1, -1)
    if spec.granularity == "channel":
        return weight
    if spec.group_along == "inputs":
        return weight.reshape(-1, group_size(spec, columns))
    size = group_size(spec, rows)
    return weight.reshape(rows // size, size, columns).transpose(1, 2).reshape(-1, size)


def _fit_dual(weight: Float[Tensor, "o i"], spec: QuantSpec, importance: Float[Tensor, " i"]) -> Grid:
    """Two grids a row: one for the outlier columns, one for the others (ERQ v2, dual uniform quantization)."""
    outlier = outlier_columns(weight)
    parts = []
    for chosen in (~outlier, outlier):
        side = chosen if bool(chosen.any()) else ~chosen  # a single column has no other side
        weighed = importance[side].expand(weight.shape[0], -1)
        parts.append(search_range(weight[:, side], spec, importance=weighed))
    low, high = (torch.stack([part[k] for part in parts], dim=1) for k in (0, 1))
    return grid_of_ranges(low, high, spec, None, outlier.long())


def outlier_columns(weight: Float[Tensor, "o i"]) -> Bool[Tensor, " i"]:
    """The columns that are most often beyond a row's own 99th (1st) percentile of positive (negative) entries.

    Their number is o // 20 but leaves at least one column on either side (none of a single one); ties go to the lower
    column.
    """
    rows, columns = weight.shape
    high = _signed_quantile(weight, torch.gt, OUTLIER_PERCENTILE)
    low = _signed_quantile(weight, torch.lt, 1 - OUTLIER_PERCENTILE)
    counts = ((weight > high) | (weight < low)).sum(dim=0)
    chosen = max(1, min(rows // OUTLIER_COLUMNS_PER_ROW, columns - 1))
    order = torch.argsort(counts, descending=True, stable=True)
    mask = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    mask[order[:chosen]] = columns > 1
    return mask


def _signed_quantile(
    weight: Float[Tensor, "o i"], side: Callable[[Tensor, int], Tensor], p: float
) -> Float[Tensor, "o 1"]:
    """Per row, the p-quantile of the entries on one side of zero; NaN (never exceeded) where there are none."""
    return torch.nanquantile(torch.where(side(weight, 0), weight, torch.nan), p, dim=1, keepdim=True)
