"""Classes: a split keeps the mean, every class its budget, and promotion goes by rank."""

from itertools import product

import numpy as np
import pytest

from dither.allocation.classes import (
    budgets_by_error,
    noise_of_decibels,
    promote,
    promote_by_group,
    scan_splits,
    solve_parts,
    split_average,
)
from dither.allocation.knapsack import knapsack
from dither.allocation.problem import Problem
from dither.errors import InputError

BITS = np.array([2.0, 4.0, 8.0])


def drawn(units: int = 8, seed: int = 0) -> tuple[Problem, np.ndarray]:
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 5, units).astype(np.float64)
    scores = generator.lognormal(size=units)[:, None] * 4.0**-BITS
    return Problem(scores, {"size": weights[:, None] * BITS}, {"size": np.inf}), weights


@pytest.mark.parametrize("ratio", np.linspace(0.46, 1.36, 10))
@pytest.mark.parametrize("share", [2.242, 1.206, 0.3])
def test_every_split_keeps_the_mean(ratio: float, share: float) -> None:
    content, quality = split_average(4.0, float(ratio), share)
    assert share * content + quality == pytest.approx(4.0 * (1 + share))
    assert content == pytest.approx(ratio * quality)


def test_decibels_become_costs_that_add_up() -> None:
    np.testing.assert_allclose(noise_of_decibels(np.array([0.0, 10.0, 30.0])), [1, 0.1, 0.001])


def test_each_class_is_solved_at_its_best_within_its_own_budget() -> None:
    problem, weights = drawn()
    part_of = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    budgets = {part: 4.0 * float(weights[part_of == part].sum()) for part in (0, 1)}
    found = solve_parts(problem, part_of, budgets, "size", knapsack)
    for part in (0, 1):
        rows = np.flatnonzero(part_of == part)
        costs, scores = problem.costs["size"][rows], problem.scores[rows]
        every = [one for one in product(range(3), repeat=4) if costs[range(4), one].sum() <= budgets[part]]
        best = min(float(scores[range(4), one].sum()) for one in every)
        assert float(scores[range(4), np.array(found.choice)[rows]].sum()) == pytest.approx(best)
    with pytest.raises(InputError, match="class 1"):
        solve_parts(problem, part_of, {0: budgets[0], 1: 1.0}, "size", knapsack)


def test_the_scan_takes_what_the_judge_likes_best_and_says_what_could_not_be_met() -> None:
    problem, weights = drawn()
    first = [True, False] * 4

    def judge(choice: tuple[int, ...]) -> float:
        return abs(float(BITS[np.array(choice)[::2]].mean()) - 3.0)

    ratios = [0.1, 0.5, 0.75, 1.0, 1.3]
    scan = scan_splits(problem, first, weights, 4.0, ratios, "size", knapsack, judge)
    assert [one.measured for one in scan.splits] == sorted(judge(one.choice) for one in scan.splits)
    assert 0.1 in scan.refused and "class 0" in scan.refused[0.1]
    for split in scan.splits:
        assert float(problem.costs["size"][range(8), split.choice].sum()) <= 4.0 * weights.sum() + 1e-9
    with pytest.raises(InputError, match="no split of 1 bits"):
        scan_splits(problem, first, weights, 1.0, ratios, "size", knapsack, judge)


def test_budgets_by_error_keep_the_mean_and_favour_the_sensitive() -> None:
    errors, weights = np.array([4.0, 1.0, 0.01, 4.0]), np.array([1.0, 2.0, 3.0, 1.0])
    bits = budgets_by_error(errors, weights, 5.0, 4.0, 8.0)
    assert float((weights * bits).sum()) == pytest.approx(5.0 * 7)
    assert bits[0] == bits[3] > bits[1] > bits[2] == 4.0
    np.testing.assert_allclose(budgets_by_error(errors, weights, 8.0, 4.0, 8.0), 8.0)
    with pytest.raises(InputError, match="average between 4 and 8"):
        budgets_by_error(errors, weights, 3.0, 4.0, 8.0)


def test_promotion_goes_by_rank_and_passes_over_what_does_not_fit() -> None:
    cost = np.array([1.0, 5.0, 1.0, 1.0])[:, None] * BITS
    problem = Problem(np.zeros((4, 3)), {"size": cost}, {"size": 28.0})
    rank = np.array([1.0, 9.0, 5.0, 3.0])
    found = promote(problem, [0, 0, 0, 0], [1, 1, 1, 1], rank)
    assert found.choice == (0, 1, 1, 0)
    with pytest.raises(InputError, match="options to begin with exceed"):
        promote(problem, [2, 2, 2, 2], [2, 2, 2, 2], rank)


def test_each_group_and_time_range_has_its_own_promotions() -> None:
    cost = np.tile(BITS, (6, 1))
    problem = Problem(np.zeros((6, 3)), {"size": cost}, {"size": np.inf})
    part_of, rank = np.array([0, 0, 0, 1, 1, 1]), np.array([1.0, 3.0, 2.0, 9.0, 8.0, 7.0])
    found = promote_by_group(problem, part_of, {0: 16.0, 1: 12.0}, "size", [1] * 6, [2] * 6, rank)
    assert found.choice == (1, 2, 1, 1, 1, 1)
