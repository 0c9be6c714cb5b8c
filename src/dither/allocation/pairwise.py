"""Choices whose units also cost together: local search by flips and swaps from the best choice without pairs.

Score of a choice = Σ_u scores[u, choice_u] + Σ_{u<v} P(u, v), with P(u, v) = pairs[p][u, v] where both have option p.
Of two options it is the geometric mean of both, 0 where their signs differ: exact where errors only change in size.

Source: the quadratic program of CLADO and the inter-layer terms of arXiv 2306.04879; the search is ours.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from dither.allocation.knapsack import knapsack
from dither.allocation.problem import Problem, Solution

_ROUNDS = 1000  # a move each; the score falls with every one, so this only bounds huge tables


def pair_costs(pairs: Mapping[int, Float[np.ndarray, "u u"]], shape: tuple[int, int]) -> Float[np.ndarray, "u p u p"]:
    """P of every two units and options, symmetric and without a diagonal; options without a matrix cost nothing."""
    units, options = shape
    rows = np.zeros((options, units, units))
    for option, matrix in pairs.items():
        rows[option] = (matrix + matrix.T) / 2
        np.fill_diagonal(rows[option], 0.0)
    roots = np.sign(rows) * np.sqrt(np.abs(rows))
    product = roots[:, None] * roots[None, :]  # [p, q, u, v]
    same = roots[:, None] * np.sign(roots[None, :]) > 0
    signed = np.where(same, np.sign(roots[:, None]) * np.abs(product), 0.0)
    found: Float[np.ndarray, "u p u p"] = np.ascontiguousarray(signed.transpose(2, 0, 3, 1))
    return found


def pair_score(problem: Problem, costs: Float[np.ndarray, "u p u p"], choice: tuple[int, ...]) -> float:
    """Of a choice, what units cost together included."""
    rows = np.arange(len(choice))
    taken = costs[rows, list(choice)][:, rows, list(choice)]
    return problem.score(choice) + math.fsum(taken.flatten()) / 2


def pairwise(problem: Problem) -> Solution:
    """The choice that no change of one unit, and no exchange of two units' options, makes better within the budgets.

    Raises:
        InputError: no choice meets all budgets.
    """
    costs = pair_costs(problem.pairs, (len(problem.scores), problem.scores.shape[1]))
    choice = knapsack(problem).choice
    for _ in range(_ROUNDS):
        moved = _best_move(problem, costs, choice)
        if moved is None:
            break
        choice = moved
    return Solution(choice, pair_score(problem, costs, choice), -math.inf, "pairwise", "best of its neighbours")


def _best_move(
    problem: Problem, costs: Float[np.ndarray, "u p u p"], choice: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The flip or swap that lowers the score most; None where there is none."""
    rows, now = np.arange(len(choice)), np.array(choice)
    scores = np.where(problem.allowed, problem.scores, np.inf)
    field = scores + costs[:, :, rows, now].sum(axis=2)  # [u, p]: of each option, beside what the others have
    change = field - field[rows, now][:, None]
    tolerance = 1e-12 * max(1.0, float(np.abs(problem.scores[np.isfinite(problem.scores)]).max(initial=0.0)))
    tolerance = min(tolerance, 1e-9 * float(np.abs(field[rows, now]).sum()) + 1e-300)
    moves: list[tuple[float, tuple[tuple[int, int], ...]]] = [
        (float(change[u, p]), ((int(u), int(p)),)) for u, p in np.argwhere(change < -tolerance)
    ]
    for first in range(len(choice)):
        for second in range(first + 1, len(choice)):
            one, two = int(now[second]), int(now[first])
            if one == two or not np.isfinite(change[first, one] + change[second, two]):
                continue
            both = costs[first, one, second, two] - costs[first, one, second, one] - costs[first, two, second, two]
            delta = float(change[first, one] + change[second, two] + both + costs[first, two, second, one])
            if delta < -tolerance:
                moves.append((delta, ((first, one), (second, two))))
    for _, parts in sorted(moves):
        trial = list(choice)
        for unit, option in parts:
            trial[unit] = option
        if problem.fits(trial):
            return tuple(trial)
    return None
