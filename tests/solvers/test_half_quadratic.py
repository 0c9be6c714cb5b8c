"""Half-quadratic splitting against its formulas written out, and against every zero-point of a fine list."""

import math

import pytest
import torch
from torch import Tensor

from dither.formats.cells import cell_sums
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.spec import QuantSpec
from dither.solvers.half_quadratic import shrunk, split_half_quadratic, with_zero_point

NORM = 0.7


def skewed(rows: int = 6, columns: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).exp() - 1


def fitted(weight: Tensor, text: str = "int3:g16:asym:tight:realzero") -> Grid:
    return fit_grid(weight, QuantSpec.parse(text))


def errors(weight: Tensor, grid: Grid) -> Tensor:
    return cell_sums((weight - grid.round(weight)).abs().pow(NORM), grid)


def test_small_differences_are_no_outliers_and_large_ones_shrink_a_little() -> None:
    d = [-2.0, -0.5, 0.3, 5.0]
    expected = [math.copysign(abs(x) - abs(x) ** (NORM - 1) / 10, x) for x in d]
    torch.testing.assert_close(shrunk(torch.tensor([d]), NORM, 10.0), torch.tensor([expected]))
    assert shrunk(torch.tensor([[0.0, 0.1, -0.15]]), NORM, 10.0).tolist() == [[0, 0, 0]]  # below β^(-1/(2-p)) = 0.17


def test_one_step_is_the_papers_update_of_one_group() -> None:
    weight = skewed(1, 16)
    grid = fitted(weight)
    s, z = float(grid.scale), float(grid.zero_point)
    q = torch.round(weight / s + z).clamp(0, 7)
    d = weight - s * (q - z)
    e = d.sign() * (d.abs() - d.abs().pow(NORM - 1) / 10).clamp_min(0)
    expected = float((q - (weight - e) / s).mean())
    found = split_half_quadratic(weight, grid, NORM, 10.0, 1.01, 1)
    if float(errors(weight, with_zero_point(grid, torch.tensor([[expected]])))) < float(errors(weight, grid)):
        assert float(found.zero_point) == pytest.approx(expected, rel=1e-3)  # float16
    else:
        assert float(found.zero_point) == z


@pytest.mark.parametrize(
    "text",
    [
        "int3:g16:asym:tight:realzero", "int4:channel:asym:realzero", "int2:tensor:asym:realzero",
        "int3:g3:ic:asym:realzero", "int3:g16:asym:tight:realzero:s4.3",
    ],
)  # fmt: skip
def test_no_cell_gets_worse_and_most_get_better(text: str) -> None:
    weight = skewed()
    grid = fitted(weight, text)
    found = split_half_quadratic(weight, grid, NORM, 10.0, 1.01, 20)
    before, after = errors(weight, grid), errors(weight, found)
    if "s4.3" not in text:  # zero-points of a group share their storage, so that one moves when another does
        assert bool((after <= before).all())
    assert float(after.sum()) < float(before.sum())
    assert torch.equal(found.scale, grid.scale)


def test_the_best_zero_point_is_kept_not_the_last() -> None:
    weight = skewed(40, 64)
    grid = fitted(weight)
    total = [float(errors(weight, split_half_quadratic(weight, grid, NORM, 10.0, 1.01, n)).sum()) for n in range(8)]
    assert total == sorted(total, reverse=True)
    assert total[-1] < total[0]


def test_zero_points_are_held_as_they_are_stored() -> None:
    weight = skewed()
    real = split_half_quadratic(weight, fitted(weight), NORM, 10.0, 1.01, 20).zero_point
    assert torch.equal(real, real.half().float())


@pytest.mark.parametrize("text", ["int3:g16:sym", "int3:g16:asym"])
def test_a_grid_without_real_zero_points_stays(text: str) -> None:
    weight = skewed()
    grid = fitted(weight, text)
    assert split_half_quadratic(weight, grid, NORM, 10.0, 1.01, 20) is grid


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 16)
    found = split_half_quadratic(weight, fitted(weight), NORM, 10.0, 1.01, 20)
    assert torch.equal(found.round(weight), weight)
