"""The whole frontier of size against score by dynamic programming, so that every budget is solved at once (ZeroQ).

Units are added one by one; of the sums so far only those stay that no other beats in both cost and score, which is
exact. Costs that are whole numbers of a common unit keep the frontier small.

Source: ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281), section 3.2: Pareto frontier by dynamic programming.
Departs from it: dominance instead of a grid of sizes, which loses nothing; buckets only where a caller asks for them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from dither.allocation.problem import Problem, Solution
from dither.errors import InputError

POINTS = 200_000  # of a frontier; beyond it exactness costs minutes, and milp is quicker


@dataclass(frozen=True)
class Frontier:
    """Costs (rising) and scores (falling) of the choices that no other beats; `choice` gives one of them."""

    costs: Float[np.ndarray, " f"]
    scores: Float[np.ndarray, " f"]
    parents: tuple[Int[np.ndarray, " _"], ...]
    options: tuple[Int[np.ndarray, " _"], ...]

    def __len__(self) -> int:
        return len(self.costs)

    def choice(self, point: int) -> tuple[int, ...]:
        """The option of each unit at a point of the frontier."""
        found = []
        for parent, option in zip(reversed(self.parents), reversed(self.options), strict=True):
            found.append(int(option[point]))
            point = int(parent[point])
        return tuple(reversed(found))

    def best(self, budget: float) -> int:
        """The point of least score within a budget."""
        return int(np.searchsorted(self.costs, budget + 1e-12 * abs(budget), side="right")) - 1


def frontier(problem: Problem, points: int = POINTS, buckets: int | None = None) -> Frontier:
    """All choices within the budget that no other beats; with `buckets` only the best for each of so many sizes.

    Raises:
        InputError: there is more than one budget, or the frontier has more than `points` points.
    """
    resource = problem.only_resource
    useful, budget = problem.useful(), problem.budgets[resource]
    table = problem.costs[resource]
    least = np.where(useful, table, np.inf).min(axis=1)
    ahead = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0.0]])  # what the units still to come take at least
    costs, scores = np.zeros(1), np.zeros(1)
    parents: list[Int[np.ndarray, " _"]] = []
    options: list[Int[np.ndarray, " _"]] = []
    for unit in range(len(table)):
        chosen = np.flatnonzero(useful[unit])
        new_cost = (costs[:, None] + table[unit, chosen]).ravel()
        new_score = (scores[:, None] + problem.scores[unit, chosen]).ravel()
        keep = undominated(new_cost, new_score)
        limit = budget - ahead[unit]
        keep = keep[new_cost[keep] <= limit + 1e-12 * abs(budget)]
        if buckets is not None:
            keep = keep[_last_of_bucket(new_cost[keep], buckets)]
        if len(keep) > points:
            raise InputError(
                f"the frontier has more than {points} points after {unit + 1} of {len(table)} units: use milp"
            )
        costs, scores = new_cost[keep], new_score[keep]
        parents.append(keep // len(chosen))
        options.append(chosen[keep % len(chosen)])
    return Frontier(costs, scores, tuple(parents), tuple(options))


def dynamic(problem: Problem) -> Solution:
    """The exact choice within one budget.

    Raises:
        InputError: there is more than one budget, or too long a frontier.
    """
    found = frontier(problem)
    choice = found.choice(found.best(problem.budgets[problem.only_resource]))
    score = problem.score(choice)
    return Solution(choice, score, score, "dp", "optimal")


def undominated(costs: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> Int[np.ndarray, " f"]:
    """The points that no other beats or equals in both, by rising cost."""
    order = np.lexsort((scores, costs))
    best = np.minimum.accumulate(scores[order])
    falls: Bool[np.ndarray, " n"] = np.concatenate([[True], best[1:] < best[:-1]])
    kept: Int[np.ndarray, " f"] = order[falls]
    return kept


def _last_of_bucket(costs: Float[np.ndarray, " f"], buckets: int) -> Int[np.ndarray, " g"]:
    """Of the points in each of so many equal intervals of cost the last, which scores least."""
    width = (costs[-1] - costs[0]) / buckets
    if not width > 0:
        return np.arange(len(costs))
    place = np.minimum(((costs - costs[0]) / width).astype(int), buckets - 1)
    last: Int[np.ndarray, " g"] = np.flatnonzero(np.concatenate([place[1:] != place[:-1], [True]]))
    return last if last[0] == 0 else np.concatenate([[0], last])
