"""Strategies find the best of a small space, never try a point twice, and follow from seed and history alone."""

import sys
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
from tests.tuning.conftest import cost

from dither.errors import DependencyError, InputError
from dither.tuning import STRATEGIES, make_strategy
from dither.tuning.genetic import Genetic
from dither.tuning.space import Dimension, Space
from dither.tuning.surrogate import Earlier, Surrogate
from dither.tuning.trial import Trial, best, penalized

Play = Callable[..., list[Trial]]
try:
    import xgboost  # noqa: F401
except ImportError:
    HAS_TREES = False
else:
    HAS_TREES = True
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name == "xgboost" and not HAS_TREES, reason="xgboost is not installed"))
    for name in STRATEGIES
]
needs_trees = pytest.mark.skipif(not HAS_TREES, reason="xgboost is not installed")


def to_best(name: str, space: Space, seed: int) -> int:
    """Trials until the best of the space is found."""
    searcher = make_strategy(name, space, seed)
    while not searcher.trials or searcher.trials[-1].cost != 0:
        (point,) = searcher.ask()
        searcher.tell(Trial(len(searcher.trials), point, cost(point)))
    return len(searcher.trials)


@pytest.mark.parametrize("name", NAMES)
def test_every_point_is_tried_once_if_there_are_trials_enough(name: str, play: Play, space: Space) -> None:
    count = 40 if name == "xgboost" else 120
    trials = play(name, count=count)
    assert len({trial.point for trial in trials}) == len(trials) == min(count, len(space))
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert best(trials).cost == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_search_and_another_seed_another(name: str, play: Play) -> None:
    points = [[trial.point for trial in play(name, seed=seed, count=14)] for seed in (3, 3, 4)]
    assert points[0] == points[1]
    assert (points[0] != points[2]) == (name != "grid")


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_answer_begins_with_the_smaller_one(name: str, play: Play, space: Space) -> None:
    searcher = make_strategy(name, space, 1)
    for trial in play("random", seed=5, count=12):
        searcher.tell(trial)
    assert searcher.ask(6)[:2] == searcher.ask(2)


def test_grid_search_follows_the_order_of_the_space(play: Play, space: Space) -> None:
    assert [trial.point for trial in play("grid")] == list(space.points)


@needs_trees
def test_boosted_trees_need_fewer_trials_than_random_search(space: Space) -> None:
    trees = [to_best("xgboost", space, seed) for seed in range(5)]
    random = [to_best("random", space, seed) for seed in range(40)]
    assert 35 < fmean(random) < 62  # (96 + 1) / 2 is expected
    assert fmean(trees) < 0.6 * fmean(random)


def test_genetic_search_needs_fewer_trials_than_random_search(space: Space) -> None:
    genetic = [to_best("genetic", space, seed) for seed in range(30)]
    random = [to_best("random", space, seed) for seed in range(30)]
    assert fmean(genetic) < 0.8 * fmean(random)


def test_children_have_the_values_of_both_parents_and_mutants_any(space: Space) -> None:
    one, other = space.points[0], space.points[-1]
    still, wild = Genetic(space, mutation=0.0), Genetic(space, mutation=1.0)
    children = [still.crossed(one, other, draw(seed)) for seed in range(60)]
    assert [set(values) for values in zip(*children, strict=True)] == [
        set(pair) for pair in zip(one, other, strict=True)
    ]
    mutants = [wild.crossed(one, one, draw(seed)) for seed in range(60)]
    seen = [set(values) for values in zip(*mutants, strict=True)]
    assert seen == [set(dimension.values) for dimension in space.dimensions]


def test_the_better_of_two_that_are_drawn_wins(space: Space) -> None:
    searcher, generator = Genetic(space), draw(0)
    parents = [Trial(0, space.points[0], 0.1), Trial(1, space.points[1], 0.2)]
    won = sum(searcher.winner(parents, generator) == space.points[0] for _ in range(400))
    assert 270 < won < 330  # three quarters: it loses only where the other is drawn twice


def draw(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed)


@needs_trees
def test_trials_of_another_model_lead_to_the_best_at_once(space: Space) -> None:
    earlier = [Earlier(space.configuration(p), 0.1 + 2 * cost(p), {"depth": 12.0}) for p in space.points]
    found = []
    for seed in range(3):
        searcher = Surrogate(space, seed, {"depth": 9.0}, earlier, epsilon=0.0)
        points = []
        while not points or cost(points[-1]) > 0:
            points += searcher.ask()
            searcher.tell(Trial(len(points) - 1, points[-1], cost(points[-1])))
        found.append(len(points))
    assert max(found) <= 5


@needs_trees
def test_earlier_trials_of_other_dimensions_are_refused(space: Space) -> None:
    with pytest.raises(InputError, match="earlier trials need values of samples"):
        Surrogate(space, 0, {}, [Earlier({"scheme": "sym"}, 0.0)])


def test_an_absent_package_is_named_with_the_extra_that_brings_it(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(DependencyError, match=r"dither\[tune\]"):
        make_strategy("xgboost", space)


def test_unknown_strategies_and_lessons_that_are_lost_on_one_are_refused(space: Space) -> None:
    with pytest.raises(InputError, match="did you mean 'genetic'"):
        make_strategy("genetics", space)
    with pytest.raises(InputError, match="learns nothing from earlier trials"):
        make_strategy("random", space, 0, {}, [Earlier({}, 0.0)])


def test_failures_and_broken_limits_cost_more_than_all_else_and_are_never_the_best() -> None:
    trials = [Trial(0, ("a",), 0.3), Trial(1, ("b",), None), Trial(2, ("c",), 0.0, 0.5), Trial(3, ("d",), 0.1)]
    assert best(trials) == trials[3]
    costs = penalized(trials)
    assert list(costs[[0, 3]]) == [0.3, 0.1]
    assert costs[1] > costs[2] > costs[0]
    assert best([trials[1], trials[2]]) is None
    assert best([Trial(0, ("a",), 0.1, 0.0, 2.0), Trial(1, ("b",), 0.1, 0.0, 1.0)]) == Trial(1, ("b",), 0.1, 0.0, 1.0)
    assert [trial.number for trial in sorted(trials, key=lambda trial: trial.rank)] == [3, 0, 2, 1]


def test_a_space_of_one_point_is_searched_with_one_trial() -> None:
    searcher = make_strategy("genetic", Space.of([Dimension("a", ("x",))]))
    assert searcher.ask(5) == [("x",)]
    searcher.tell(Trial(0, ("x",), 1.0))
    assert searcher.ask() == []
