"""Every solver against all choices of small problems, and what must not change its answer."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from dither.allocation.even import even
from dither.allocation.frontier import dynamic, frontier
from dither.allocation.knapsack import knapsack
from dither.allocation.lagrangian import hull, lagrangian
from dither.allocation.monotone import monotone
from dither.allocation.pairwise import pair_costs, pair_score, pairwise
from dither.allocation.problem import Problem, Solver, tied
from dither.allocation.solve import SOLVERS, solver_named
from dither.allocation.uniform import uniform
from dither.errors import InputError


def random_problem(seed: int, units: int = 8, options: int = 3, resources: int = 1, room: float = 0.5) -> Problem:
    """Scores that fall with the bits, costs in whole numbers, a budget between the least and the most."""
    generator = np.random.default_rng(seed)
    bits = np.arange(2, 2 + options)
    importance = generator.lognormal(0, 2, units)[:, None]
    scores = importance * 4.0**-bits * generator.uniform(0.5, 1.5, (units, options))
    costs = {
        f"r{number}": generator.integers(1, 50, units)[:, None] * bits
        + 1.0 * generator.integers(0, 3, (units, options))
        + generator.integers(0, 3.0, (units, options)) * 1.0
        for number in range(resources)
    }
    spread = {name: (c.min(axis=1).sum(), c.max(axis=1).sum()) for name, c in costs.items()}
    budgets = {name: float(np.floor(low + room * (high - low))) for name, (low, high) in spread.items()}
    return Problem(scores, costs, budgets, importance[:, 0])


def all_fitting(problem: Problem) -> Iterator[tuple[int, ...]]:
    units, options = problem.scores.shape
    return (choice for choice in itertools.product(range(options), repeat=units) if problem.fits(choice))


SEEDS = range(5)


@pytest.mark.parametrize("solver", [knapsack, dynamic])
@pytest.mark.parametrize("seed", SEEDS)
def test_exact_solvers_find_the_best_of_all_choices(solver: Solver, seed: int) -> None:
    problem = random_problem(seed, room=[0.02, 0.2, 0.5, 0.8, 1.0][seed])
    found = solver(problem)
    best = min(problem.score(choice) for choice in all_fitting(problem))
    assert problem.fits(found.choice)
    assert found.score == pytest.approx(best, rel=1e-9)
    assert found.status == "optimal"
    assert found.gap < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_several_budgets_hold_at_once(seed: int) -> None:
    problem = random_problem(seed, units=7, resources=3)
    found = knapsack(problem)
    assert problem.fits(found.choice)
    assert found.score == pytest.approx(min(problem.score(c) for c in all_fitting(problem)), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_lagrangian_choice_fits_and_its_bound_is_below_the_optimum(seed: int) -> None:
    problem = random_problem(seed)
    found, best = lagrangian(problem), min(problem.score(choice) for choice in all_fitting(problem))
    assert problem.fits(found.choice)
    assert found.bound <= best * (1 + 1e-12)
    assert best <= found.score * (1 + 1e-12)


def test_the_lagrangian_is_close_where_there_are_many_units() -> None:
    problem = random_problem(0, units=300, options=6)
    assert lagrangian(problem).gap < 1e-3
    assert knapsack(problem).score <= lagrangian(problem).score


@pytest.mark.parametrize("name", ["milp", "lagrangian", "dp", "hawq-v2", "uniform"])
@pytest.mark.parametrize(("scores", "costs"), [(1e9, 1e12), (1e-9, 1e-12), (1e-12, 1e9)])
def test_units_of_measurement_do_not_matter(name: str, scores: float, costs: float) -> None:
    problem = random_problem(3)
    scaled = replace(
        problem,
        scores=problem.scores * scores,
        costs={"r0": problem.costs["r0"] * costs},
        budgets={"r0": problem.budgets["r0"] * costs},
    )
    assert solver_named(name)(scaled).choice == solver_named(name)(problem).choice


def test_a_tiny_part_of_the_score_still_counts() -> None:
    """HiGHS drops coefficients below its tolerances; units of a billionth of the others' scores must still be right."""
    one = random_problem(1)
    scores, costs = np.concatenate([one.scores, 1e-9 * one.scores]), np.concatenate([one.costs["r0"]] * 2)
    faint = Problem(scores, {"r0": costs}, {"r0": costs.max(axis=1).sum() - 30})
    assert knapsack(faint).score == pytest.approx(dynamic(faint).score, rel=1e-13)


@pytest.mark.parametrize("name", ["milp", "lagrangian", "dp"])
def test_options_that_another_one_beats_are_never_chosen(name: str) -> None:
    problem = random_problem(2)
    worse = replace(
        problem,
        scores=np.concatenate([problem.scores * 1.5, problem.scores], axis=1),
        costs={"r0": np.concatenate([problem.costs["r0"] + 1, problem.costs["r0"]], axis=1)},
    )
    assert min(solver_named(name)(worse).choice) >= 3
    assert not worse.useful()[:, :3].any()


def test_of_equal_options_one_stays() -> None:
    problem = random_problem(2)
    twice = replace(
        problem,
        scores=np.concatenate([problem.scores] * 2, axis=1),
        costs={"r0": np.concatenate([problem.costs["r0"]] * 2, axis=1)},
    )
    assert twice.useful().sum() == problem.useful().sum()


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_an_option_that_a_unit_cannot_have_is_not_given_to_it(name: str) -> None:
    problem = random_problem(4)
    scores = problem.scores.copy()
    scores[0, 2] = np.inf
    found = solver_named(name)(replace(problem, scores=scores))
    assert found.choice[0] != 2
    assert problem.fits(found.choice)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_cheapest_and_the_dearest_budget_give_the_extreme_choices(name: str) -> None:
    problem = random_problem(0)
    low, high = problem.range("r0")
    dearest = solver_named(name)(replace(problem, budgets={"r0": high}))
    assert dearest.score == pytest.approx(problem.scores.min(axis=1).sum())
    cheapest = solver_named(name)(replace(problem, budgets={"r0": low}))
    assert problem.spent(cheapest.choice)["r0"] == low


def test_a_budget_that_cannot_be_met_is_refused_with_what_can() -> None:
    problem = random_problem(0)
    low, high = problem.range("r0")
    with pytest.raises(InputError, match=f"choices take {low:.6g} to {high:.6g}"):
        replace(problem, budgets={"r0": low - 1})


def test_budgets_that_exclude_each_other_are_refused() -> None:
    scores = np.array([[2.0, 1.0]] * 4)
    costs = {"a": np.array([[1.0, 4.0]] * 4), "b": np.array([[4.0, 1.0]] * 4)}
    with pytest.raises(InputError, match="no choice meets them together"):
        knapsack(Problem(scores, costs, {"a": 7.0, "b": 7.0}))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_frontier_holds_the_optimum_of_every_budget(seed: int) -> None:
    problem = random_problem(seed, units=6, room=1.0)
    found = frontier(problem)
    assert (np.diff(found.costs) > 0).all()
    assert (np.diff(found.scores) < 0).all()
    for budget in np.linspace(*problem.range("r0"), 7):
        tighter = replace(problem, budgets={"r0": float(budget)})
        choice = found.choice(found.best(budget))
        assert tighter.fits(choice)
        assert problem.score(choice) == pytest.approx(min(problem.score(c) for c in all_fitting(tighter)))


def test_a_frontier_in_buckets_is_short_and_no_better_than_the_exact_one() -> None:
    problem = random_problem(0, units=20, options=5, room=1.0)
    exact, short = frontier(problem), frontier(problem, buckets=20)
    assert len(short) <= 21 < len(exact)
    for cost, score in zip(short.costs, short.scores, strict=True):
        assert score >= exact.scores[exact.best(cost)] * (1 - 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_hull_is_convex_and_on_the_frontier(seed: int) -> None:
    problem = random_problem(seed, units=6, room=1.0)
    corners = hull(problem)
    exact = frontier(problem)
    costs, scores = (np.array([corner[place] for corner in corners]) for place in (0, 1))
    slopes = np.diff(scores) / np.diff(costs)
    assert (slopes < 0).all()
    assert (np.diff(slopes) >= -1e-12 * np.abs(slopes[1:])).all()
    for cost, score, choice in corners:
        assert score == pytest.approx(exact.scores[exact.best(cost)])
        assert problem.score(choice) == score


@pytest.mark.parametrize("seed", SEEDS)
def test_the_monotone_choice_is_the_best_of_the_ordered_ones(seed: int) -> None:
    problem = random_problem(seed, units=7)
    found = monotone(problem)
    order = np.argsort(-problem.priority)  # type: ignore[operator]
    ordered = [choice for choice in all_fitting(problem) if (np.diff(np.array(choice)[order]) <= 0).all()]
    assert (np.diff(np.array(found.choice)[order]) <= 0).all()
    assert found.score == pytest.approx(min(problem.score(choice) for choice in ordered))


def test_the_monotone_solver_needs_an_order() -> None:
    with pytest.raises(InputError, match="mean trace"):
        monotone(replace(random_problem(0), priority=None))


def test_one_format_for_all_is_the_best_one_that_fits() -> None:
    problem = random_problem(0, room=0.55)
    assert set(uniform(problem).choice) == {1}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_even_mix_fills_the_budget_with_two_neighbouring_formats(seed: int) -> None:
    problem = random_problem(seed, units=40, options=4, room=0.6)
    choice = even(problem).choice
    low, high = min(choice), max(choice)
    assert problem.fits(choice) and high - low <= 1
    whole = problem.costs["r0"].sum(axis=0)
    assert whole[low] <= problem.budgets["r0"] < whole[low + 1]
    extra = problem.costs["r0"][:, low + 1] - problem.costs["r0"][:, low]
    wanted = (problem.budgets["r0"] - whole[low]) / extra.sum()
    taken = np.cumsum(extra * (np.array(choice) > low))
    assert np.abs(taken - wanted * np.cumsum(extra)).max() <= extra.max()


def test_an_even_mix_at_the_size_of_a_format_is_that_format() -> None:
    problem = random_problem(2)
    exact = replace(problem, budgets={"r0": float(problem.costs["r0"][:, 1].sum())})
    assert set(even(exact).choice) == {1}
    nowhere = np.where(np.eye(8, 3, dtype=bool), np.inf, problem.scores)
    with pytest.raises(InputError, match="no option fits"):
        even(replace(problem, scores=nowhere))


def test_tied_units_get_the_same_option_and_what_they_cost_together() -> None:
    problem = random_problem(1, units=6)
    merged, index = tied(problem, [(4, 1), (2, 5)])
    assert merged.scores.shape == (4, 3)
    choice = np.array(knapsack(merged).choice)[index]
    assert choice[1] == choice[4]
    assert choice[2] == choice[5]
    alike = [c for c in all_fitting(problem) if c[1] == c[4] and c[2] == c[5]]
    assert problem.score(choice) == pytest.approx(min(problem.score(c) for c in alike))


@pytest.mark.parametrize("seed", SEEDS)
def test_tied_units_keep_what_they_cost_together_with_each_other_and_with_the_rest(seed: int) -> None:
    problem, draw = random_problem(seed, units=6), np.random.default_rng(seed)
    problem = replace(problem, pairs={2: draw.normal(size=(6, 6))})
    merged, index = tied(problem, [(4, 1), (2, 5)])
    inner, outer = (pair_costs(one.pairs, one.scores.shape) for one in (problem, merged))
    for choice in itertools.product(range(3), repeat=4):
        whole = tuple(choice[group] for group in index)
        assert pair_score(merged, outer, choice) == pytest.approx(pair_score(problem, inner, whole))
    assert len(pairwise(merged).choice) == 4


def test_an_unknown_solver_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'lagrangian'"):
        solver_named("lagrange")
