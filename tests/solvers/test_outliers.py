"""Outliers against their definitions, counted and left out one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import InputError
from dither.formats.grid import decode, encode
from dither.formats.ranges import affine
from dither.formats.spec import QuantSpec
from dither.solvers.outliers import (
    Spread,
    filled_with_mean,
    iqr_ratio,
    iqr_threshold,
    leave_one_out_gains,
    top_by_score,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_highest_scores_are_chosen_over_the_layer_or_in_each_row() -> None:
    score = torch.tensor([[9.0, 8.0, 7.0, 1.0], [6.0, 0.0, 5.0, 2.0]])
    assert top_by_score(score, 0.5).tolist() == [[True, True, True, False], [True, False, False, False]]
    assert top_by_score(score, 0.5, "row").tolist() == [[True, True, False, False], [True, False, True, False]]
    assert not bool(top_by_score(score, 0.05).any())
    assert bool(top_by_score(score, 1.0).all())


def test_of_equal_scores_the_first_are_chosen() -> None:
    assert top_by_score(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert top_by_score(torch.ones(2, 3), 1 / 3, "row").tolist() == [[True, False, False]] * 2


def test_outliers_become_the_mean_of_the_rest_of_their_group() -> None:
    weight = torch.tensor([[1.0, 3.0, 99.0, 5.0], [-9.0, -9.0, 2.0, 4.0]])
    mask = torch.tensor([[False, False, True, False], [True, True, False, False]])
    assert filled_with_mean(weight, mask).tolist() == [[1, 3, 3, 5], [3, 3, 2, 4]]
    assert filled_with_mean(weight, mask, 2).tolist() == [[1, 3, 5, 5], [0, 0, 2, 4]]
    assert torch.equal(filled_with_mean(weight, torch.zeros_like(mask)), weight)


@pytest.mark.parametrize(
    ("first", "third", "ratio", "expected"), [(-1.0, 2.0, 1.5, 6.5), (-3.0, 1.0, 0.0, 3.0), (1.0, 2.0, 2.0, 4.0)]
)
def test_the_threshold_is_the_farther_end_of_the_whiskers(
    first: float, third: float, ratio: float, expected: float
) -> None:
    assert iqr_threshold(first, third, ratio) == expected
    assert iqr_threshold(-third, -first, ratio) == expected


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), fraction=st.sampled_from([0.0, 0.004, 0.03, 0.2]))
def test_one_ratio_for_all_matrices_gives_the_share_of_outliers_that_was_asked_for(seed: int, fraction: float) -> None:
    weights = [
        drawn(30, 20, seed=seed),
        7 * drawn(25, 16, seed=seed + 1) ** 3,
        0.01 * drawn(8, 5, seed=seed + 2) + 0.02,
    ]
    ratio = iqr_ratio([Spread.of(weight) for weight in weights], fraction)
    total, count = sum(weight.numel() for weight in weights), 0
    for weight in weights:
        quartiles = weight.float().quantile(torch.tensor([0.25, 0.75])).tolist()
        count += int((weight.abs() >= iqr_threshold(*quartiles, ratio)).sum())
    assert abs(count - fraction * total) <= 1.001


def test_a_spread_of_fewer_points_counts_nearly_the_same() -> None:
    weight = drawn(500, 200)
    exact, coarse = Spread.of(weight), Spread.of(weight, points=1000)
    assert coarse.tail.shape[0] <= 1000
    assert iqr_ratio([coarse], 0.004) == pytest.approx(iqr_ratio([exact], 0.004), rel=0.02)
    assert iqr_ratio([exact], 0.004) == pytest.approx(1.63, rel=0.03)  # of a normal distribution


def test_a_share_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected a fraction from 0 to below 0\.5, got 0\.7"):
        iqr_ratio([Spread.of(drawn(3, 3))], 0.7)
    with pytest.raises(InputError, match="outliers of 0 weights"):
        iqr_ratio([], 0.1)


def error(group: Tensor, others: list[int], sensitivity: Tensor, spec: QuantSpec) -> float:
    """The weighted error of some weights of a row on the grid of their own extremes."""
    part = group[others]
    scale, zero_point = affine(part.amin()[None], part.amax()[None], spec, stored=False)
    rounded = decode(encode(part, scale, zero_point, spec), scale, zero_point)
    return float(((rounded - part).square() * sensitivity[others]).sum())


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 6), text=st.sampled_from(["int2:asym:tight:realzero", "int3:asym", "int3"]),
    levels=st.sampled_from([2, 1000]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_what_a_group_gains_without_a_weight_is_found_by_leaving_it_out(
    size: int, text: str, levels: int, seed: int
) -> None:
    group = (drawn(4, size, seed=seed) * levels).round() / levels  # few levels give equal extremes
    sensitivity, spec = drawn(size, seed=seed + 1).exp(), QuantSpec.parse(text)
    found = leave_one_out_gains(group, sensitivity, spec)
    for row in range(4):
        base = error(group[row], list(range(size)), sensitivity, spec)
        for left in range(size):
            others = [k for k in range(size) if k != left]
            rest = error(group[row], others, sensitivity, spec) if others else 0.0
            assert float(found[row, left]) == pytest.approx(base - rest, rel=1e-6, abs=1e-9)


def test_an_outlier_gains_more_than_the_others() -> None:
    group = drawn(3, 16) * 0.1
    group[:, 5] = 9.0
    gains = leave_one_out_gains(group, torch.ones(16, dtype=torch.float64), QuantSpec.parse("int3:asym:tight:realzero"))
    assert gains.argmax(dim=1).tolist() == [5, 5, 5]
    assert bool((gains[:, 5] > 1.7 * gains[:, :5].amax(dim=1)).all())
