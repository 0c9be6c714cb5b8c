"""Cells of every granularity, against the grid's own idea of which scale an entry uses."""

import pytest
import torch

from dither.formats.cells import cell_errors, cell_extremes, cell_sums
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.spec import QuantSpec

SPECS = ["int4:tensor", "int4:channel", "int4:g4", "int4:g3:ic", "int4:channel:dual"]


@pytest.fixture(params=SPECS)
def case(request: pytest.FixtureRequest) -> tuple[torch.Tensor, Grid]:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return weight, fit_grid(weight, QuantSpec.parse(request.param))


def members(grid: Grid, cell: int) -> torch.Tensor:
    """Which entries [o, i] use the cell, asked of the grid with the cells' numbers as scales."""
    numbers = torch.arange(grid.scale.numel()).reshape(grid.scale.shape).float()
    found, _ = Grid(grid.spec, numbers, numbers, grid.row_of, grid.column_of).cells()
    return found.expand(6, 8) == cell


def test_sums_and_extremes_are_those_of_the_entries_that_use_the_cell(case: tuple[torch.Tensor, Grid]) -> None:
    weight, grid = case
    sums, (low, high) = cell_sums(weight, grid).flatten(), cell_extremes(weight, grid)
    assert sums.numel() == grid.scale.numel()
    for cell in range(grid.scale.numel()):
        entries = weight[members(grid, cell)]
        assert float(sums[cell]) == pytest.approx(float(entries.sum()), abs=1e-5)
        assert float(low.flatten()[cell]) == float(entries.min())
        assert float(high.flatten()[cell]) == float(entries.max())


def test_an_error_is_that_of_the_output_if_only_the_cell_were_wrong(case: tuple[torch.Tensor, Grid]) -> None:
    difference, grid = case
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    errors = cell_errors(difference, x.T @ x, grid).flatten()
    for cell in range(grid.scale.numel()):
        alone = torch.where(members(grid, cell), difference, 0.0)
        assert float(errors[cell]) == pytest.approx(float((x @ alone.T).square().sum()), rel=1e-4)
    torch.testing.assert_close(cell_errors(difference, None, grid), cell_errors(difference, torch.eye(8), grid))
