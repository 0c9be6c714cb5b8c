"""Clusters of sensitivities, each with the same option: the most sensitive cluster has the most bits (CPTQuant).

Source: CPTQuant (Nanda et al., arXiv 2412.03599): blocks in three clusters with 16, 8 and 4 bits. An early version of
the authors' repository names k-harmonic means, its code k-means of a random start.
Departs from it: clusters are the exact optimum in one dimension, so nothing is random, and are ordered by their means
before they get bits (the released scripts take the arbitrary numbers of the clusters); within a budget the clusters'
options are those of least score that fit, still in order.
"""

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
from jaxtyping import Float, Int

from dither.allocation.problem import Problem, Solution
from dither.errors import InputError

CLUSTERS = 3  # the paper's 16, 8 and 4 bits
_POWER = 3.5  # of distances, in k-harmonic means
_TURNS = 200


def clusters(values: Float[np.ndarray, " n"], count: int) -> Int[np.ndarray, " n"]:
    """The cluster of each value, 0 for the largest, of least squared distances to the means: exact, by sorting and DP.

    There are fewer than `count` clusters where there are fewer different values.

    Raises:
        InputError: values that are not finite, or no cluster at all.
    """
    if count < 1 or not np.isfinite(values).all():
        raise InputError(f"expected finite sensitivities and at least one cluster, got {count}")
    order = np.argsort(-values, kind="stable")
    line = values[order].astype(np.float64)
    line, n = line - line.mean() if len(line) else line, len(line)
    count = min(count, len(np.unique(line)))
    first, second = (np.concatenate([[0.0], np.cumsum(line**power)]) for power in (1, 2))

    def error(start: int, stop: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        found: Float[np.ndarray, " k"] = (
            second[stop] - second[start] - (first[stop] - first[start]) ** 2 / np.maximum(stop - start, 1)
        )
        return found

    best, cuts = np.full((count + 1, n + 1), np.inf), np.zeros((count + 1, n + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for k in range(1, count + 1):
        for start in range(k - 1, n):
            stops = np.arange(start + 1, n + 1)
            total = best[k - 1, start] + error(start, stops)
            better = total < best[k, stops]
            best[k, stops[better]], cuts[k, stops[better]] = total[better], start
    labels, stop = np.zeros(n, dtype=np.int64), n
    for k in range(count, 0, -1):
        start = int(cuts[k, stop])
        labels[order[start:stop]], stop = k - 1, start
    return labels


def harmonic_clusters(values: Float[np.ndarray, " n"], count: int) -> Int[np.ndarray, " n"]:
    """As `clusters`, by k-harmonic means from those on: Σ over values of k / Σ over centres 1 / distance^3.5."""
    start = clusters(values, count)
    centres = np.array([values[start == label].mean() for label in np.unique(start)], dtype=np.float64)
    spread = max(float(np.ptp(values)), 1e-300)
    for _ in range(_TURNS):
        distance = np.abs(values[:, None] - centres) / spread + 1e-9
        inverse = distance**-_POWER
        weight = distance ** (-_POWER - 2) / inverse.sum(axis=1, keepdims=True) ** 2
        moved = (weight * values[:, None]).sum(axis=0) / weight.sum(axis=0)
        if np.allclose(moved, centres, rtol=0, atol=1e-12 * spread):
            break
        centres = moved
    return ranked(values, np.abs(values[:, None] - centres).argmin(axis=1))


def ranked(values: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Clusters numbered by falling mean, whatever their numbers were."""
    names = np.unique(labels)
    means = np.array([values[labels == name].mean() for name in names])
    order = names[np.argsort(-means, kind="stable")]
    return np.array([int(np.flatnonzero(order == label)[0]) for label in labels], dtype=np.int64)


def bits_of_clusters(
    values: Float[np.ndarray, " n"], bits: Sequence[int] = (16, 8, 4), harmonic: bool = False
) -> Int[np.ndarray, " n"]:
    """The paper's allocation, which knows no budget: bits of each value's cluster, the most for the largest values."""
    labels = (harmonic_clusters if harmonic else clusters)(values, len(bits))
    found: Int[np.ndarray, " n"] = np.array(sorted(bits, reverse=True), dtype=np.int64)[labels]
    return found


def clustered(problem: Problem) -> Solution:
    """Clusters of `priority`, options in the order of their costs: of what is within all budgets that of least score.

    Raises:
        InputError: the table has no priority, or no ordered choice fits.
    """
    if problem.priority is None:
        raise InputError("clusters need a sensitivity of each unit, as cmpq, pmpq or tdmpq measure; use another solver")
    labels = clusters(problem.priority, CLUSTERS)
    order = problem.largest_first(next(iter(problem.budgets)))  # as clusters are
    best: tuple[float, tuple[int, ...]] | None = None
    for places in combinations_with_replacement(range(len(order)), int(labels.max()) + 1):
        choice = tuple(int(order[places[label]]) for label in labels)
        if problem.fits(choice) and (best is None or problem.score(choice) < best[0]):
            best = problem.score(choice), choice
    if best is None:
        raise InputError("no options fit the budget for all clusters in the order of their sensitivity; use milp")
    return Solution(best[1], best[0], -math.inf, "clusters", "best in order")
