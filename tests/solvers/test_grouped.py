"""Many small Grams at once give what each gives alone."""

import pytest
import torch
from torch import Tensor

from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.spec import QuantSpec
from dither.solvers.columns import round_by_columns
from dither.solvers.grouped import absorb_by_group, round_by_columns_in_groups
from dither.solvers.ridge import absorb_activation_error
from dither.statistics.gram import Gram
from dither.statistics.grouped_gram import GroupedGram

SPEC = QuantSpec.parse("int3:channel:asym:minmax")


def made(groups: int, each: int, width: int, ones: bool) -> tuple[Tensor, Tensor, Tensor, GroupedGram]:
    generator = torch.Generator().manual_seed(groups)
    x = (
        torch.randn(40, groups * width, generator=generator).double()
        @ torch.randn(groups * width, groups * width, generator=generator).double()
    )
    seen = (x * 2).round() / 2
    weight = torch.randn(groups * each, width + ones, generator=generator).double()
    return weight, seen, x, GroupedGram.of(seen, groups, x, ones)


@pytest.mark.parametrize(("groups", "each", "width"), [(1, 3, 4), (3, 1, 4), (2, 3, 5)])
@pytest.mark.parametrize("ones", [True, False])
def test_every_group_is_solved_as_it_would_be_alone(groups: int, each: int, width: int, ones: bool) -> None:
    weight, seen, x, gram = made(groups, each, width, ones)
    grid = fit_grid(weight[:, :width].float(), SPEC)
    assert isinstance(grid, Grid)
    found = absorb_by_group(weight, gram, 0.7)
    rounded, _ = round_by_columns_in_groups(weight, gram, grid, width, 0.01)
    error = 0.0
    for group in range(groups):
        rows, columns = slice(group * each, (group + 1) * each), slice(group * width, (group + 1) * width)
        alone = Gram.of(seen[:, columns], x[:, columns], ones)
        torch.testing.assert_close(gram.quantized[group], alone.quantized)
        torch.testing.assert_close(gram.cross[group], alone.cross)
        torch.testing.assert_close(found[rows], absorb_activation_error(weight[rows], alone, 0.7))
        part = Grid(SPEC, grid.scale[rows], grid.zero_point[rows])
        expected = round_by_columns(weight[rows], alone.quantized, part, width, 0.01, act_order=False)
        torch.testing.assert_close(rounded[rows], expected.weight)
        error += alone.output_error(weight[rows], rounded[rows]) * float(
            ((weight[rows] @ alone.original) * weight[rows]).sum()
        )
    power = sum(
        float(((weight[g * each : (g + 1) * each] @ gram.original[g]) * weight[g * each : (g + 1) * each]).sum())
        for g in range(groups)
    )
    assert gram.output_error(weight, rounded) == pytest.approx(error / power)


def test_sums_of_batches_are_those_of_the_whole_and_dead_columns_do_no_harm() -> None:
    weight, seen, x, gram = made(3, 2, 4, True)
    merged = GroupedGram.of(seen[:11], 3, x[:11], True).merge(GroupedGram.of(seen[11:], 3, x[11:], True))
    torch.testing.assert_close(merged.cross, gram.cross)
    seen[:, 5] = 0
    dead = GroupedGram.of(seen, 3)
    grid = fit_grid(weight[:, :4].float(), SPEC)
    rounded, _ = round_by_columns_in_groups(weight[:, :4], dead, grid, 4, 0.01)
    assert bool(rounded.isfinite().all())
    assert dead.rows == 40


@pytest.mark.parametrize("ones", [True, False])
def test_many_rows_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch, ones: bool) -> None:
    _, seen, x, whole = made(3, 2, 4, ones)
    monkeypatch.setattr("dither.statistics.grouped_gram._PART", 7 * seen.shape[1])
    parts = GroupedGram.of(seen, 3, x, ones)
    for name in ("quantized", "cross", "original"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    same = GroupedGram.of(seen, 3, None, ones)
    torch.testing.assert_close(same.original, whole.quantized)
