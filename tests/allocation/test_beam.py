"""The beam: the exact choice where sums are true, a better one where units are not independent, budgets always kept."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tests.allocation.test_solvers import SEEDS, all_fitting, random_problem

from dither.allocation.beam import UNTOUCHED, Choice, beam
from dither.allocation.frontier import dynamic
from dither.allocation.problem import Problem
from dither.errors import InputError


def total(problem: Problem, pairs: np.ndarray, choice: Choice) -> float:
    """Scores of what is chosen so far, and what neighbours cost together."""
    known = [(unit, option) for unit, option in enumerate(choice) if option != UNTOUCHED]
    both = sum(pairs[u, p, q] for (u, p), (_, q) in itertools.pairwise(known))
    return float(sum(problem.scores[unit, option] for unit, option in known) + both)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_exact_where_scores_add_up(seed: int) -> None:
    problem = random_problem(seed, units=7)
    nothing = np.zeros((7, 3, 3))
    choice, value = beam(problem, lambda some: [total(problem, nothing, one) for one in some], 2, 200, 50, 50)
    assert problem.fits(choice)
    assert value == pytest.approx(dynamic(problem).score)
    assert problem.score(choice) == pytest.approx(value)


def test_what_is_measured_together_leads_past_the_best_sum() -> None:
    better = 0
    for seed in range(12):
        problem = random_problem(seed, units=7)
        pairs = np.random.default_rng(seed).exponential(problem.scores.mean(), size=(7, 3, 3))
        seen: list[Choice] = []

        def judge(some: Sequence[Choice], problem: Problem = problem, pairs: np.ndarray = pairs) -> list[float]:
            seen.extend(some)  # noqa: B023
            return [total(problem, pairs, one) for one in some]

        choice, value = beam(problem, judge, 2, 10, 6, 3)
        assert problem.fits(choice)
        assert value == pytest.approx(total(problem, pairs, choice))
        assert {len(one) for one in seen} == {7}
        assert {one.index(UNTOUCHED) if UNTOUCHED in one else 7 for one in seen} == {2, 4, 6, 7}
        additive = total(problem, pairs, dynamic(problem).choice)
        best = min(total(problem, pairs, one) for one in all_fitting(problem))
        assert best <= value * (1 + 1e-9)
        better += value < additive * (1 - 1e-9)
        assert value <= additive * (1 + 1e-9)
    assert better >= 6


def test_options_that_a_unit_cannot_have_and_second_budgets_are_refused() -> None:
    problem = random_problem(0, units=4)
    scores = problem.scores.copy()
    scores[1, 0] = np.inf
    choice, _ = beam(replace(problem, scores=scores), lambda some: [0.0] * len(some), 3, 5, 3, 2)
    assert choice[1] != 0
    two = replace(problem, costs={**problem.costs, "x": problem.costs["r0"]}, budgets={**problem.budgets, "x": 1e9})
    with pytest.raises(InputError, match="meets one budget"):
        beam(two, lambda some: [0.0] * len(some), 3, 5, 3, 2)
