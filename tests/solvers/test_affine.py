"""Fitted grids: never worse than the extremes' range, exact where they can be, weighed by column."""

import pytest
import torch
from torch import Tensor

from dither.errors import SpecError
from dither.formats.fit import fit_uniform
from dither.formats.grid import Grid
from dither.formats.spec import QuantSpec
from dither.solvers.affine import can_be_signed, fit_affine, fit_signed


def matrix(rows: int = 16, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(grid: Grid, weight: Tensor, importance: Tensor | None = None) -> float:
    square = (grid.round(weight) - weight).square()
    return float((square if importance is None else square * importance).sum())


@pytest.mark.parametrize("text", ["int3:g8:asym:tight:realzero", "int2:g16:asym", "int3:channel:asym:tight"])
@pytest.mark.parametrize("weighed", [False, True])
def test_an_affine_grid_beats_the_search_of_the_format(text: str, weighed: bool) -> None:
    importance = torch.rand(32, generator=torch.Generator().manual_seed(1)).pow(4) if weighed else None
    found = error(fit_affine(matrix(), QuantSpec.parse(text), importance), matrix(), importance)
    for search, share in (("minmax", 1.0), ("mse", 1.02)):  # an integer zero-point is rounded after its line is fitted
        spec = QuantSpec.parse(f"{text}:{search}")
        assert found < share * error(fit_uniform(matrix(), spec, importance), matrix(), importance)


def test_values_on_a_line_are_found_again() -> None:
    spec = QuantSpec.parse("int2:channel:asym:tight:realzero")
    weight = torch.tensor([[0.3, 0.5, 0.7, 0.9, 0.5], [-2.0, -1.0, -4.0, -3.0, -1.0]])
    torch.testing.assert_close(fit_affine(weight, spec).round(weight), weight, rtol=2e-3, atol=2e-3)  # float16 scales


@pytest.mark.parametrize("text", ["int3:g4:asym:tight:realzero", "int3:g4:asym", "int3:g4:asym:tight:realzero:s4.8"])
def test_cells_of_one_value_stay_finite_and_dead_columns_do_no_harm(text: str) -> None:
    weight = torch.zeros(8, 8)
    weight[2:4] = 1.5
    weight[4:] = matrix(4, 8)
    importance = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1])
    grid = fit_affine(weight, QuantSpec.parse(text), importance)
    assert bool(grid.round(weight).isfinite().all())
    assert float((grid.round(weight) - weight).abs().max()) < 1.0


@pytest.mark.parametrize("bits", [2, 3])
def test_a_signed_grid_reaches_furthest_on_the_larger_side(bits: int) -> None:
    spec = QuantSpec.parse(f"int{bits}:g8:sym")
    grid = fit_signed(matrix(), spec, search=False)
    cells = matrix().reshape(16, 4, 8)
    larger = torch.where(cells.amax(2) > -cells.amin(2), cells.amax(2), cells.amin(2))
    torch.testing.assert_close(grid.scale * -(2 ** (bits - 1)), larger, rtol=1e-3, atol=1e-6)
    assert error(grid, matrix()) < error(fit_uniform(matrix(), spec), matrix())
    assert error(fit_signed(matrix(), spec), matrix()) < error(grid, matrix())


@pytest.mark.parametrize("text", ["int3:g8:asym", "int3:g8:narrow", "int3:tensor:sym", "int1:channel", "int3:g8:s4.4"])
def test_formats_without_room_for_a_sign_are_refused(text: str) -> None:
    assert not can_be_signed(QuantSpec.parse(text))
    with pytest.raises(SpecError):
        fit_signed(matrix(), QuantSpec.parse(text))


@pytest.mark.parametrize("text", ["int3:g8:sym", "int3:g8:ic:asym", "nf4:g8"])
def test_an_affine_grid_needs_an_offset_and_cells_of_its_own(text: str) -> None:
    with pytest.raises(SpecError):
        fit_affine(matrix(), QuantSpec.parse(text))
