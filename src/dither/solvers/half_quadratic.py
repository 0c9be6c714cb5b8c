"""HQQ: move a grid's zero-points so that few weights are far off, by half-quadratic splitting; needs no data.

With d = W - Q⁻¹(Q(W)), one step shrinks d to the part that is treated as outliers, e = sign(d) max(|d| - |d|^(p-1)/β,
0), then sets each zero-point to mean(q - (W - e) / scale) over its cell; scales stay. Where every |d| is below
β^(-1/(2-p)), 0.17 for the published p and β, e is 0, and the steps alternate between codes and the zero-points of least
squared error: so it is for the weights of most language models.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, and the released code.
Departs from the released code: each cell keeps the best zero-point it had, its first included, by Σ|d|^p, where the
code ends with the last of the whole matrix; zero-points are rounded to their storage in every step.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.cells import cell_sums
from dither.formats.grid import Grid
from dither.formats.ranges import zero_points
from dither.formats.second_level import SecondLevel
from dither.formats.spec import QuantSpec


def split_half_quadratic(
    weight: Float[Tensor, "o i"], grid: Grid, norm: float, beta: float, kappa: float, iterations: int
) -> Grid:
    """The grid with zero-points of lower Σ|d|^norm in every cell, or the same ones; β grows by `kappa` each step.

    Grids without real zero-points come back as they are.
    """
    if not has_real_zero_points(grid.spec):
        return grid
    count, current = cell_sums(torch.ones_like(weight), grid), grid
    best, error = grid.zero_point, _error(weight, grid, norm)
    for _ in range(iterations):
        codes, scale = current.encode(weight), current.cells()[0]
        outlying = shrunk(weight - current.decode(codes), norm, beta)
        moved = with_zero_point(current, cell_sums(codes - (weight - outlying) / scale, grid) / count)
        found = _error(weight, moved, norm)
        best, error = torch.where(found < error, moved.zero_point, best), torch.minimum(found, error)
        if torch.equal(moved.zero_point, current.zero_point):
            break
        current, beta = moved, beta * kappa
    return with_zero_point(grid, best)


def has_real_zero_points(spec: QuantSpec) -> bool:
    """Whether a grid of this format has zero-points that can be moved freely."""
    return spec.stores_zero_point and spec.zero_point == "real"


def shrunk(difference: Float[Tensor, "o i"], norm: float, beta: float) -> Float[Tensor, "o i"]:
    """The generalized soft threshold sign(d) max(|d| - |d|^(norm-1) / beta, 0); 0 at 0."""
    size = difference.abs()
    return difference.sign() * (size - size.pow(norm - 1) / beta).clamp_min(0)


def with_zero_point(grid: Grid, zero_point: Float[Tensor, "R C"]) -> Grid:
    """The grid with other zero-points, rounded as they are stored.

    Raises:
        SpecError: a zero-point is too large for its storage.
    """
    spec = grid.spec
    if spec.second_level is None:
        return replace(grid, zero_point=zero_points(-zero_point * grid.scale, grid.scale, spec))
    second = SecondLevel.of(zero_point, *spec.second_level, positive=False)
    return replace(grid, zero_point=second.decode().to(zero_point), zero_point_codes=second)


def _error(weight: Float[Tensor, "o i"], grid: Grid, norm: float) -> Float[Tensor, "R C"]:
    return cell_sums((weight - grid.round(weight)).abs().pow(norm), grid)
