"""Problem and Solution: the multiple-choice knapsack that every allocator solves.

minimise Σ_u scores[u, choice_u] subject to Σ_u costs_r[u, choice_u] ≤ budget_r for each resource r: one choice a unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from dither.errors import InputError, ShapeError, nearest

_ROUNDING = 1e-12  # of a budget: sums of fractional costs differ by this in another order; whole bits never do


@dataclass(frozen=True)
class Problem:
    """Scores and costs of each unit and option, and a budget for each resource; infinite scores cannot be chosen.

    `priority` is there for solvers that order units (largest first), `pairs` for those that look at what units with the
    same option cost together beyond their scores.
    """

    scores: Float[np.ndarray, "u p"]
    costs: Mapping[str, Float[np.ndarray, "u p"]]
    budgets: Mapping[str, float]
    priority: Float[np.ndarray, " u"] | None = None
    pairs: Mapping[int, Float[np.ndarray, "u u"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the problem makes sense and that each budget alone can be met.

        Raises:
            InputError: a budget below the least that any choice takes; the message gives the range.
        """
        if not self.budgets:
            raise InputError("an allocation needs at least one budget")
        for name in self.budgets:
            if name not in self.costs:
                known = ", ".join(self.costs)
                raise InputError(f"there is no cost {name!r} in the table; it has {known}{nearest(name, self.costs)}")
            if self.costs[name].shape != self.scores.shape:
                raise ShapeError(f"costs {name!r} of {self.costs[name].shape}, scores of {self.scores.shape}")
        if not self.allowed.any(axis=1).all():
            raise InputError(f"unit {int(np.argmin(self.allowed.any(axis=1)))} has no option at all")
        for name, budget in self.budgets.items():
            low, high = self.range(name)
            if not within(low, budget):
                raise InputError(
                    f"{name} of {budget:.6g} cannot be met: choices take {low:.6g} to {high:.6g}; "
                    "ask for more, or offer smaller options"
                )

    @property
    def allowed(self) -> Bool[np.ndarray, "u p"]:
        """Which options a unit can have."""
        found: Bool[np.ndarray, "u p"] = np.isfinite(self.scores)
        for name in self.budgets:
            found = found & np.isfinite(self.costs[name])
        return found

    @property
    def only_resource(self) -> str:
        """The one resource with a budget.

        Raises:
            InputError: there are several.
        """
        if len(self.budgets) > 1:
            raise InputError(f"this solver meets one budget, not {', '.join(self.budgets)}; use milp")
        return next(iter(self.budgets))

    def range(self, resource: str) -> tuple[float, float]:
        """The least and the most that a choice takes of a resource."""
        costs, allowed = self.costs[resource], self.allowed
        low = np.where(allowed, costs, np.inf).min(axis=1)
        high = np.where(allowed, costs, -np.inf).max(axis=1)
        return math.fsum(low), math.fsum(high)

    def largest_first(self, resource: str) -> Int[np.ndarray, " p"]:
        """Options by what they take of a resource: of the most that a unit could, on average over those that can."""
        costs = np.where(self.allowed, self.costs[resource], 0.0)
        most = costs.max(axis=1, keepdims=True)
        share = costs / np.where(most > 0, most, 1.0)
        found: Int[np.ndarray, " p"] = np.argsort(
            -share.sum(axis=0) / np.maximum(self.allowed.sum(axis=0), 1), kind="stable"
        )
        return found

    def score(self, choice: Sequence[int] | Int[np.ndarray, " u"]) -> float:
        """Of a choice; exactly rounded, so in any order the same."""
        return math.fsum(self.scores[np.arange(len(self.scores)), np.asarray(choice)])

    def spent(self, choice: Sequence[int] | Int[np.ndarray, " u"]) -> dict[str, float]:
        """What a choice takes of each resource, whether it has a budget or not."""
        rows = np.arange(len(self.scores))
        return {name: math.fsum(costs[rows, np.asarray(choice)]) for name, costs in self.costs.items()}

    def fits(self, choice: Sequence[int] | Int[np.ndarray, " u"]) -> bool:
        """Whether a choice is allowed and within all budgets."""
        rows, spent = np.arange(len(self.scores)), self.spent(choice)
        allowed = bool(self.allowed[rows, np.asarray(choice)].all())
        return allowed and all(within(spent[name], budget) for name, budget in self.budgets.items())

    def useful(self) -> Bool[np.ndarray, "u p"]:
        """Options that no other option of the unit beats or equals in score and in every budgeted cost."""
        parts = [self.scores, *(self.costs[name] for name in self.budgets)]
        stack = np.stack([np.where(self.allowed, part, np.inf) for part in parts])  # [r, u, p]
        no_worse = (stack[:, :, :, None] <= stack[:, :, None, :]).all(axis=0)  # [u, p, q]: p is no worse than q
        same = (stack[:, :, :, None] == stack[:, :, None, :]).all(axis=0)
        order = np.arange(self.scores.shape[1])
        beats = no_worse & ~(same & (order[:, None] >= order[None, :]))  # of equals the first stays
        found: Bool[np.ndarray, "u p"] = self.allowed & ~beats.any(axis=1)
        return found


@dataclass(frozen=True)
class Solution:
    """The option of each unit; no choice within the budgets scores less than `bound`."""

    choice: tuple[int, ...]
    score: float
    bound: float
    solver: str
    status: str

    @property
    def gap(self) -> float:
        """How much of the score a better choice could save at most, as a share of it; 0 is proven optimal."""
        saved = max(self.score - self.bound, 0.0)
        return saved / abs(self.score) if saved and self.score else saved


@runtime_checkable
class Solver(Protocol):
    """Chooses one option a unit."""

    def __call__(self, problem: Problem) -> Solution:
        """A choice within the budgets."""
        ...


def within(spent: float, budget: float) -> bool:
    """Whether something fits in a budget, up to the rounding of sums."""
    return bool(spent <= budget + _ROUNDING * abs(budget))


def tied(problem: Problem, groups: Sequence[Sequence[int]]) -> tuple[Problem, Int[np.ndarray, " u"]]:
    """The problem whose units are groups of this one's, with summed scores and costs, and the group of each unit.

    Units in no group stay alone. A solution's choice, indexed by the groups, is that of the units. What units of one
    group cost together is part of the group's score, as they always have the same option.
    """
    index = np.full(len(problem.scores), -1)
    for number, group in enumerate(groups):
        index[list(group)] = number
    alone = np.flatnonzero(index < 0)
    index[alone] = len(groups) + np.arange(len(alone))
    index = np.unique(np.array([np.flatnonzero(index == number)[0] for number in index]), return_inverse=True)[1]
    priority, scores, pairs = problem.priority, _sums(problem.scores, index), {}
    for option, matrix in problem.pairs.items():
        both = _sums(_sums((matrix + matrix.T) / 2, index).T, index)
        scores[:, option] += (both.diagonal() - _sums(matrix.diagonal()[:, None], index)[:, 0]) / 2
        pairs[option] = both - np.diag(both.diagonal())
    merged = replace(
        problem,
        scores=scores,
        pairs=pairs,
        costs={name: _sums(costs, index) for name, costs in problem.costs.items()},
        priority=None if priority is None else _largest(priority, index),
    )
    return merged, index


def _sums(values: Float[np.ndarray, "u p"], index: Int[np.ndarray, " u"]) -> Float[np.ndarray, "g p"]:
    total = np.zeros((int(index.max()) + 1, values.shape[1]))
    np.add.at(total, index, values)
    return total


def _largest(values: Float[np.ndarray, " u"], index: Int[np.ndarray, " u"]) -> Float[np.ndarray, " g"]:
    found = np.full(int(index.max()) + 1, -np.inf)
    np.maximum.at(found, index, values)
    return found
