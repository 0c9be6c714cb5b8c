"""HAWQ-V2's rule: a unit with a larger mean Hessian trace never gets fewer bits than one with a smaller.

Along the units in order of trace a configuration is then a falling sequence of options: C(L + m - 1, m - 1) of them
instead of m^L. The one of least score within the budget is taken.

Source: HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852), section 3.3: Pareto frontier of the ordered search space.
Departs from it: the configurations are not listed one by one, but added unit by unit, and those that another one of the
same last option beats are dropped; the optimum is the same. It is the best of the ordered ones, not of all.
"""

import numpy as np
from jaxtyping import Float, Int

from dither.allocation.frontier import POINTS, undominated
from dither.allocation.problem import Problem, Solution
from dither.errors import InputError


def monotone(problem: Problem) -> Solution:
    """The best choice that falls along `priority`; options are ordered by what they take of the resource in all.

    Raises:
        InputError: no priority, more than one budget, or no ordered choice fits.
    """
    resource = problem.only_resource
    if problem.priority is None:
        raise InputError("the monotone solver orders units by their mean trace; measure with sensitivity hawq-v2")
    costs, budget = problem.costs[resource], problem.budgets[resource]
    largest_first = problem.largest_first(resource)
    units = np.argsort(-problem.priority, kind="stable")
    table = np.where(problem.allowed, costs, np.inf)[units][:, largest_first]
    scores = np.where(problem.allowed, problem.scores, np.inf)[units][:, largest_first]
    stages = _stages(table, scores, budget)
    ends = [(stage.scores[-1], level) for level, stage in enumerate(stages[-1]) if len(stage.costs)]
    if not ends:
        raise InputError(
            f"{resource} of {budget:.6g}: no choice that falls with the trace fits; ask for more, or use milp"
        )
    level = min(ends)[1]
    ordered = _trace_back(stages, level)
    choice = np.empty(len(units), dtype=int)
    choice[units] = largest_first[ordered]
    return Solution(
        tuple(int(option) for option in choice), problem.score(choice), -np.inf, "hawq-v2", "best of the ordered"
    )


class _Stage:
    """Undominated sums whose last unit has a given option, and where each came from."""

    def __init__(self, costs: Float[np.ndarray, " f"], scores: Float[np.ndarray, " f"]) -> None:
        self.costs, self.scores = costs, scores
        self.level = self.point = np.zeros(len(costs), dtype=int)

    def came_from(self, level: Int[np.ndarray, " f"], point: Int[np.ndarray, " f"]) -> "_Stage":
        self.level, self.point = level, point
        return self


def _stages(costs: Float[np.ndarray, "u p"], scores: Float[np.ndarray, "u p"], budget: float) -> list[list[_Stage]]:
    """For each unit and option, largest first, what is worth keeping of the sums so far."""
    ahead = np.concatenate([np.cumsum(costs.min(axis=1)[::-1])[::-1][1:], [0.0]])
    stages: list[list[_Stage]] = []
    for unit in range(len(costs)):
        row = []
        for option in range(costs.shape[1]):
            before = stages[-1][: option + 1] if stages else [_Stage(np.zeros(1), np.zeros(1))]
            row.append(_extended(before, costs[unit, option], scores[unit, option], budget - ahead[unit]))
        stages.append(row)
    return stages


def _extended(before: list[_Stage], cost: float, score: float, limit: float) -> _Stage:
    level = np.concatenate([np.full(len(stage.costs), number) for number, stage in enumerate(before)])
    point = np.concatenate([np.arange(len(stage.costs)) for stage in before])
    new_cost = np.concatenate([stage.costs for stage in before]) + cost
    new_score = np.concatenate([stage.scores for stage in before]) + score
    fits = np.flatnonzero(np.isfinite(new_score) & (new_cost <= limit + 1e-12 * abs(limit)))
    keep = fits[undominated(new_cost[fits], new_score[fits])] if len(fits) else fits
    if len(keep) > POINTS:
        raise InputError(f"more than {POINTS} ordered choices are worth keeping: use milp")
    return _Stage(new_cost[keep], new_score[keep]).came_from(level[keep], point[keep])


def _trace_back(stages: list[list[_Stage]], level: int) -> Int[np.ndarray, " u"]:
    found, point = np.empty(len(stages), dtype=int), len(stages[-1][level].costs) - 1
    for unit in reversed(range(len(stages))):
        found[unit], stage = level, stages[unit][level]
        level, point = int(stage.level[point]), int(stage.point[point])
    return found
