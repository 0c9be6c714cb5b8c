"""Bits of columns: the closed form is the optimum, whole bits add up, and what cannot have bits has none."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dither.allocation.columns import equal_loss_bits, gain, levels_of_bits, losses_at, whole_bits
from dither.errors import InputError


def drawn(count: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    return torch.exp(spread * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def lost(loss: Tensor, bits: Tensor) -> float:
    return float((loss * 4.0 ** -bits.double()).sum())


def test_columns_of_equal_loss_have_the_mean_and_gain_nothing() -> None:
    bits = equal_loss_bits(torch.full((7,), 3.0), 2.5)
    torch.testing.assert_close(bits, torch.full((7,), 2.5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert gain(torch.full((7,), 3.0), bits) == pytest.approx(1)


def test_bits_are_those_of_the_closed_form_and_all_columns_lose_the_same() -> None:
    loss = drawn(40, spread=0.8)
    bits = equal_loss_bits(loss, 4.0)
    torch.testing.assert_close(bits, 4 + torch.log2(loss / loss.log().mean().exp()) / 2, rtol=0, atol=1e-9)
    after = loss * 4.0**-bits
    torch.testing.assert_close(after, after[0].expand(40), rtol=1e-9, atol=0)
    assert gain(loss, bits) == pytest.approx(float(loss.log().mean().exp() / loss.mean()))


@pytest.mark.parametrize("average", [0.3, 1.0, 2.5, 6.0, 7.9])
def test_the_conditions_of_the_optimum_hold_at_both_ends(average: float) -> None:
    """Where bits are free the loss is the water level, at no bits it is below, at the cap above."""
    loss, cost = drawn(60, spread=4.0), 1 + drawn(60, seed=1)
    bits = equal_loss_bits(loss, average, cost)
    assert float((cost * bits).sum()) == pytest.approx(average * float(cost.sum()), rel=1e-9)
    price = loss * 4.0**-bits / cost
    free = (bits > 1e-9) & (bits < 8 - 1e-9)
    level = price[free].median()
    torch.testing.assert_close(price[free], level.expand(int(free.sum())), rtol=1e-6, atol=0)
    assert bool((price[bits <= 1e-9] <= level * (1 + 1e-6)).all())
    assert bool((price[bits >= 8 - 1e-9] >= level * (1 - 1e-6)).all())


def test_scaling_all_losses_changes_nothing() -> None:
    loss = drawn(30, spread=3.0)
    for factor in (1e-9, 1e9):
        torch.testing.assert_close(equal_loss_bits(loss * factor, 2.0), equal_loss_bits(loss, 2.0), rtol=0, atol=1e-9)
        assert torch.equal(whole_bits(losses_at(loss * factor), 60), whole_bits(losses_at(loss), 60))


def test_dead_columns_have_no_bits_and_the_others_share_theirs() -> None:
    loss = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert equal_loss_bits(loss, 2.0).tolist() == pytest.approx([4, 0, 4, 0])
    assert whole_bits(losses_at(loss), 8).tolist() == [4, 0, 4, 0]
    assert equal_loss_bits(loss, 6.0).tolist() == [8, 0, 8, 0]
    assert equal_loss_bits(torch.zeros(3), 2.0).tolist() == [0, 0, 0]
    assert whole_bits(losses_at(torch.zeros(3)), 6).tolist() == [0, 0, 0]


@pytest.mark.parametrize("total", range(13))
def test_whole_bits_add_up_and_no_choice_loses_less(total: int) -> None:
    loss = drawn(4, seed=total, spread=3.0)
    bits = whole_bits(losses_at(loss, 3), total)
    assert int(bits.sum()) == total
    choices = torch.tensor([one for one in product(range(4), repeat=4) if sum(one) == total])
    best = (loss * 4.0 ** -choices.double()).sum(dim=1).min()
    assert lost(loss, bits) == pytest.approx(float(best), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_widths_of_a_set_are_close_to_the_best_and_within_the_budget(seed: int) -> None:
    loss = drawn(5, seed=seed, spread=3.0)
    bits = whole_bits(losses_at(loss), 19, {2, 4, 8})
    assert set(bits.tolist()) <= {2, 4, 8} and int(bits.sum()) <= 19
    choices = [torch.tensor(one) for one in product((2, 4, 8), repeat=5) if sum(one) <= 19]
    assert lost(loss, bits) <= 1.25 * min(lost(loss, one) for one in choices)


def test_a_loss_that_one_bit_does_not_lower_goes_to_two_at_once() -> None:
    table = torch.tensor([[9.0, 9.0, 1.0], [5.0, 4.0, 3.9]])
    assert whole_bits(table, 2).tolist() == [2, 0]
    assert whole_bits(table, 3).tolist() == [2, 1]
    assert whole_bits(table, 1).tolist() == [0, 1]


def test_levels_are_whole_and_at_least_one() -> None:
    assert levels_of_bits(torch.tensor([0.0, 1.6, 2.3, 8.0])).tolist() == [1, 3, 5, 256]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="at least 10 of widths"):
        whole_bits(losses_at(drawn(5)), 9, {2, 4})
    with pytest.raises(InputError, match="average between 0 and 8, got 9"):
        equal_loss_bits(drawn(5), 9.0)
    with pytest.raises(InputError, match="finite losses of at least 0"):
        equal_loss_bits(torch.tensor([1.0, -1.0]), 2.0)
