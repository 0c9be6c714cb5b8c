"""Bits of columns within a sweep: the predicted gain is what is measured, and dead columns take nothing."""

from math import log2

import pytest
import torch
from torch import Tensor

from dither.formats.fit import fit_grid
from dither.formats.mixed import widths_of
from dither.formats.qtensor import QTensor
from dither.formats.spec import QuantSpec
from dither.solvers.columns import Ordered, round_by_columns
from dither.solvers.mixed_columns import ColumnBits, column_losses, column_tops, round_mixed

SPEC = QuantSpec.parse("mix3:asym:realzero:mse")
LAW = ColumnBits(losses="law")


def layer(spread: float, seed: int = 0, size: int = 64, dead: int = 0) -> tuple[Tensor, Tensor]:
    """A normal weight and the Gram of inputs whose scales are log-normal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, dtype=torch.float64, generator=generator)
    scales = torch.exp(spread * torch.randn(size, dtype=torch.float64, generator=generator))
    mix = torch.eye(size, dtype=torch.float64) + 0.1 * torch.randn(size, size, dtype=torch.float64, generator=generator)
    inputs = torch.randn(6 * size, size, dtype=torch.float64, generator=generator) @ mix * scales
    inputs[:, :dead] = 0
    return weight, inputs.T @ inputs


def cost(weight: Tensor, gram: Tensor, stored: QTensor) -> float:
    change = stored.dequantize(torch.float64) - weight
    return float(((change @ gram) * change).sum())


def test_losses_of_the_law_are_squared_ranges_over_what_the_sweep_divides_by() -> None:
    weight, gram = layer(0.5, size=8)
    diagonal = Ordered.of(weight, gram, 8, 0.01, act_order=False).upper.diagonal()
    found = column_losses(weight, diagonal, QuantSpec.parse("mix3:g4:asym:realzero:tight"))
    for column in range(8):
        group = weight[:, column // 4 * 4 : column // 4 * 4 + 4]
        ranges = group.amax(dim=1) - group.amin(dim=1)
        expected = float((ranges**2).sum() / (24 * diagonal[column] ** 2))
        assert float(found[column]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("losses", "spread", "within"), [("law", 0.3, 0.25), ("measured", 0.3, 0.25), ("law", 1.0, 0.5)]
)
def test_the_predicted_gain_over_one_width_is_measured(losses: str, spread: float, within: float) -> None:
    """On normal weights at 3 bits; where widths differ much, errors of few codes do not follow the law's 4^-b."""
    ratio, predicted = [], []
    for seed in range(2):
        weight, gram = layer(spread, seed)
        stored, notes = round_mixed(weight, gram, SPEC, 3.0, ColumnBits(losses), 0.01, act_order=False)  # type: ignore[arg-type]
        same, _ = round_mixed(weight, gram, SPEC, 3.0, ColumnBits(losses, allowed=(3,)), 0.01, act_order=False)  # type: ignore[arg-type]
        ratio.append(cost(weight, gram, stored) / cost(weight, gram, same))
        predicted.append(float(notes["predicted"]))
    assert sum(ratio) / 2 == pytest.approx(sum(predicted) / 2, rel=within)
    assert sum(ratio) / 2 < (1.0 if spread < 1 else 0.4)


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("how", [LAW, ColumnBits(), ColumnBits(together=True), ColumnBits(static=True)])
def test_bits_add_up_to_the_average(average: float, how: ColumnBits) -> None:
    weight, gram = layer(0.8)
    spec = QuantSpec.parse("mix3:g8:asym:realzero:tight")
    stored, _ = round_mixed(weight, gram, spec, average, how, 0.01, act_order=True)
    widths = widths_of(stored.pack()["column_top"]).float()
    assert float(widths.mean()) == average
    assert len(set(widths.tolist())) > 1
    if how.together:
        assert bool((widths.unflatten(0, (-1, 8)) == widths.unflatten(0, (-1, 8))[:, :1]).all())


def test_dead_columns_have_no_bits_and_the_others_theirs() -> None:
    weight, gram = layer(0.5, dead=16)
    stored, _ = round_mixed(weight, gram, SPEC, 3.0, LAW, 0.01, act_order=True)
    widths = widths_of(stored.pack()["column_top"]).float()
    assert bool((widths[:16] == 0).all()) and float(widths.mean()) == 3
    plain, _ = round_mixed(weight, gram, SPEC, 3.0, ColumnBits(allowed=(3,)), 0.01, act_order=True)
    assert cost(weight, gram, stored) < 0.5 * cost(weight, gram, plain)


def test_a_set_of_widths_that_promises_nothing_leaves_one_width() -> None:
    weight, gram = layer(0.05)
    stored, notes = round_mixed(weight, gram, SPEC, 3.0, ColumnBits(allowed=(2, 4, 8)), 0.01, act_order=True)
    assert notes["widths"] == "uniform: others promise no smaller error"
    assert set(widths_of(stored.pack()["column_top"]).tolist()) == {3}
    loud, gram = layer(1.5)
    chosen, _ = round_mixed(loud, gram, SPEC, 3.0, ColumnBits(allowed=(2, 4, 8)), 0.01, act_order=True)
    assert set(widths_of(chosen.pack()["column_top"]).tolist()) == {2, 4, 8}


def test_whole_levels_have_the_mean_of_the_fractional_bits_and_take_whole_ones_in_storage() -> None:
    weight, gram = layer(0.6)
    diagonal = Ordered.of(weight, gram, 64, 0.01, act_order=False).upper.diagonal()
    alive = torch.ones(64, dtype=torch.bool)
    top, _ = column_tops(weight.float(), diagonal, alive, SPEC, 3.0, ColumnBits("law", "levels"))
    levels = [int(one) + 1 for one in top]
    assert sum(map(log2, levels)) / 64 == pytest.approx(3, abs=0.03)
    assert len(set(levels) - {1, 2, 4, 8, 16, 32, 64, 128, 256}) > 2
    assert float(widths_of(top).float().mean()) > 3.2


def test_equal_losses_leave_gptq_as_it_is() -> None:
    """A diagonal Gram and one range: every column has the same bits, and those are its nearest codes."""
    weight = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec.parse("mix3:tensor")
    stored, _ = round_mixed(weight, torch.eye(12, dtype=torch.float64), spec, 3.0, LAW, 0.01, act_order=False)
    grid = fit_grid(weight.float(), QuantSpec.parse("int3:tensor"))
    plain = round_by_columns(weight, torch.eye(12, dtype=torch.float64), grid, 12, 0.01, act_order=False)
    torch.testing.assert_close(stored.dequantize(torch.float64), plain.weight, rtol=1e-5, atol=1e-5)
