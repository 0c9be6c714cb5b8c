"""Clusters: the exact optimum on a line, numbered by their means, never by chance."""

from itertools import combinations

import numpy as np
import pytest

from dither.allocation.clusters import bits_of_clusters, clustered, clusters, harmonic_clusters, ranked
from dither.allocation.monotone import monotone
from dither.allocation.problem import Problem
from dither.errors import InputError


def error(values: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(((values[labels == one] - values[labels == one].mean()) ** 2).sum()) for one in np.unique(labels))


@pytest.mark.parametrize("seed", range(8))
def test_clusters_are_the_best_of_all(seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(size=9)
    order = np.argsort(-values)
    best = np.inf
    for cuts in combinations(range(1, 9), 2):
        labels = np.zeros(9, dtype=np.int64)
        for number, part in enumerate(np.split(order, cuts)):
            labels[part] = number
        best = min(best, error(values, labels))
    assert error(values, clusters(values, 3)) == pytest.approx(best)


def test_the_largest_values_have_the_most_bits_in_any_order_of_values() -> None:
    values = np.array([0.1, 9.0, 5.0, 0.2, 5.5])
    assert bits_of_clusters(values).tolist() == [4, 16, 8, 4, 8]
    assert bits_of_clusters(values, (4, 8, 16)).tolist() == [4, 16, 8, 4, 8]
    assert bits_of_clusters(values[::-1]).tolist() == [8, 4, 8, 16, 4]
    apart = np.array([0.1, 9.0, 5.0, 0.2, 5.1, 9.1, 0.15])
    assert bits_of_clusters(apart, harmonic=True).tolist() == [4, 16, 8, 4, 8, 16, 4]


def test_the_numbers_of_clusters_do_not_matter() -> None:
    values, labels = np.array([1.0, 1.1, 7.0, 4.0, 4.2]), np.array([0, 0, 1, 2, 2])
    for renamed in ([0, 1, 2], [2, 0, 1], [5, 3, 9], [1, 2, 0]):
        assert ranked(values, np.array(renamed)[labels]).tolist() == [2, 2, 0, 1, 1]


def test_scaling_and_shifting_values_changes_no_cluster() -> None:
    values = np.random.default_rng(0).normal(size=30)
    for find in (clusters, harmonic_clusters):
        expected = find(values, 3)
        np.testing.assert_array_equal(find(values * 1e-7, 3), expected)
        np.testing.assert_array_equal(find(values + 10, 3), expected)


def test_few_different_values_make_few_clusters() -> None:
    assert clusters(np.array([2.0, 2.0, 2.0]), 3).tolist() == [0, 0, 0]
    assert clusters(np.array([2.0, 1.0, 2.0]), 3).tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="finite sensitivities"):
        clusters(np.array([1.0, np.nan]), 2)


def problem(budget: float, priority: np.ndarray | None) -> Problem:
    cost = np.tile([2.0, 4.0, 8.0], (5, 1))
    scores = np.array([9.0, 1.0, 8.0, 2.0, 5.0])[:, None] * 4.0**-cost
    return Problem(scores, {"size": cost}, {"size": budget}, priority)


def test_within_a_budget_clusters_stay_in_order_and_the_best_is_taken() -> None:
    priority = np.array([9.0, 1.0, 8.0, 2.0, 5.0])
    found = clustered(problem(28.0, priority))
    assert found.choice == (2, 1, 2, 1, 1)
    assert clustered(problem(10.0, priority)).choice == (0,) * 5
    assert clustered(problem(40.0, priority)).choice == (2,) * 5
    with pytest.raises(InputError, match="clusters need a sensitivity of each unit"):
        clustered(problem(26.0, None))


def test_options_that_few_units_can_have_keep_their_place_in_the_order() -> None:
    costs = np.array([[4.0, 8.0], [40.0, np.inf], [40.0, np.inf]])
    scores = np.where(np.isfinite(costs), np.array([[1.0, 0.1]]), np.inf)
    narrow_first = Problem(scores, {"size": costs}, {"size": 100.0}, priority=np.array([3.0, 1.0, 1.0]))
    assert narrow_first.largest_first("size").tolist() == [1, 0]
    assert clustered(narrow_first).choice == (1, 0, 0)
    assert monotone(narrow_first).choice == (1, 0, 0)
