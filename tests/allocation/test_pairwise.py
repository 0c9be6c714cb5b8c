"""Pairs: the local search finds what exhaustive search finds, or comes close, and never leaves the budget."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from dither.allocation.knapsack import knapsack
from dither.allocation.pairwise import pair_costs, pair_score, pairwise
from dither.allocation.problem import Problem


def drawn(seed: int, units: int = 6) -> tuple[Problem, dict[int, np.ndarray]]:
    """A quadratic loss of errors whose size falls with bits: Σ dᵀ H d with a coupled H."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(units, units))
    hessian = root @ root.T / units
    sizes = np.array([1.0, 0.3, 0.1])
    scores = np.diag(hessian)[:, None] * sizes**2 / 2
    pairs = {p: hessian * sizes[p] ** 2 for p in range(3)}
    cost = np.tile([2.0, 4.0, 8.0], (units, 1))
    return Problem(scores, {"size": cost}, {"size": 4.0 * units}, None, pairs), pairs


@pytest.mark.parametrize("seed", range(12))
def test_the_search_is_close_to_the_best_of_all_and_no_worse_than_without_pairs(seed: int) -> None:
    problem, pairs = drawn(seed)
    costs = pair_costs(pairs, problem.scores.shape)
    found = pairwise(problem)
    assert problem.fits(found.choice)
    assert found.score == pytest.approx(pair_score(problem, costs, found.choice))
    every = [one for one in product(range(3), repeat=6) if problem.fits(one)]
    best = min(pair_score(problem, costs, one) for one in every)
    assert best - 1e-12 <= found.score <= 1.1 * best
    assert found.score <= pair_score(problem, costs, knapsack(problem).choice) + 1e-12


def test_pairs_change_the_choice_in_some_cases_and_a_score_is_the_quadratic_form() -> None:
    changed = 0
    for seed in range(12):
        problem, pairs = drawn(seed)
        changed += pairwise(problem).choice != knapsack(problem).choice
        moved = np.array([1.0, 0.3, 0.1])[[0, 1, 2, 2, 1, 0]]
        form = moved @ pairs[0] @ moved / 2
        costs = pair_costs(pairs, problem.scores.shape)
        # exact where all couplings of a pair have the same sign in all options, as here
        assert pair_score(problem, costs, (0, 1, 2, 2, 1, 0)) == pytest.approx(form)
    assert changed >= 2


def test_without_pairs_it_is_the_knapsack_and_signs_that_differ_cost_nothing() -> None:
    problem, _ = drawn(0)
    assert pairwise(replace(problem, pairs={})).choice == knapsack(problem).choice
    costs = pair_costs({0: np.array([[0, 4.0], [4.0, 0]]), 1: np.array([[0, -1.0], [-1.0, 0]])}, (2, 3))
    assert costs[0, 0, 1, 0] == 4 and costs[0, 1, 1, 1] == -1
    assert costs[0, 0, 1, 1] == 0 and costs[0, 2, 1, 0] == 0


@pytest.mark.parametrize("seed", range(12))
def test_no_flip_and_no_swap_makes_it_better_and_strong_couplings_are_counted_right(seed: int) -> None:
    """Couplings larger than the scores themselves, so that a wrong sum of a swap shows."""
    problem, pairs = drawn(seed, units=8)
    generator = np.random.default_rng(seed + 100)
    strong = {p: matrix + 5 * ((extra := generator.normal(size=(8, 8))) + extra.T) for p, matrix in pairs.items()}
    problem = replace(problem, pairs=strong)
    costs = pair_costs(strong, problem.scores.shape)
    found = pairwise(problem)
    assert found.score == pytest.approx(pair_score(problem, costs, found.choice))
    moves = [(u, p, None) for u in range(8) for p in range(3)] + [(u, None, v) for u in range(8) for v in range(u)]
    for first, option, second in moves:
        trial = list(found.choice)
        if second is None:
            trial[first] = option  # type: ignore[call-overload]
        else:
            trial[first], trial[second] = trial[second], trial[first]
        if problem.fits(trial):
            assert pair_score(problem, costs, tuple(trial)) >= found.score - 1e-9
