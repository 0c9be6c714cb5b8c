"""Lagrangian relaxation with greedy fill: milliseconds for thousands of units, with a bound that proves how good it is.

For a price λ ≥ 0 every unit takes the option of least score + λ cost on its own; the least λ whose choice fits is found
by bisection, and what is left of the budget buys the upgrades of best score for their cost. By weak duality
Σ min(score + λ cost) - λ budget is below the score of every choice that fits, for every λ.

Source: Everett 1963, generalized Lagrange multipliers; as used for rate-distortion by Shoham and Gersho 1988.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from dither.allocation.problem import Problem, Solution, within

_STEPS = 200  # bisection ends at neighbouring floats long before


def lagrangian(problem: Problem) -> Solution:
    """The choice of the best price, filled up.

    Raises:
        InputError: there is more than one budget.
    """
    resource = problem.only_resource
    budget = problem.budgets[resource]
    scores, costs, unit = _scaled(problem, resource)
    limit = budget / unit[1]
    price = _least_price(scores, costs, limit)
    choice = _fill(problem, _at(scores, costs, price), resource)
    bound = max(_dual(scores, costs, limit, one) for one in (price, np.nextafter(price, 0.0), 0.0))
    score = problem.score(choice)
    bound = min(bound * unit[0] + math.fsum(_floor(problem)), score)
    status = "optimal" if score <= bound else "within its bound"
    return Solution(tuple(int(option) for option in choice), score, float(bound), "lagrangian", status)


def hull(problem: Problem) -> list[tuple[float, float, tuple[int, ...]]]:
    """Cost, score and choice at every corner of the lower convex hull of the frontier, cheapest first.

    Exact choices lie on it or above; between two corners at most one unit is undecided, so it is close everywhere.
    """
    resource = next(iter(problem.budgets))
    scores, costs, _ = _scaled(problem, resource)
    choice = _at(scores, costs, math.inf)
    steps = sorted(
        (step for unit in range(len(scores)) for step in _steps(scores[unit], costs[unit], unit)),
        key=lambda step: step[0],
    )
    corners = [choice.copy()]
    for _, unit, option in steps:
        choice[unit] = option
        corners.append(choice.copy())
    table = problem.costs[resource]
    rows = np.arange(len(scores))
    return [(math.fsum(table[rows, c]), problem.score(c), tuple(int(x) for x in c)) for c in corners]


def _floor(problem: Problem) -> Float[np.ndarray, " u"]:
    """The least score of each unit."""
    least: Float[np.ndarray, " u"] = np.where(problem.allowed, problem.scores, np.inf).min(axis=1)
    return least


def _scaled(
    problem: Problem, resource: str
) -> tuple[Float[np.ndarray, "u p"], Float[np.ndarray, "u p"], tuple[float, float]]:
    """Scores above each unit's least and costs, in units of their largest; infinite where not allowed."""
    scores = np.where(problem.allowed, problem.scores - _floor(problem)[:, None], np.inf)
    costs = np.where(problem.allowed, problem.costs[resource], np.inf)
    unit = [float(np.max(part, initial=0.0, where=np.isfinite(part))) or 1.0 for part in (scores, np.abs(costs))]
    return scores / unit[0], costs / unit[1], (unit[0], unit[1])


def _at(scores: Float[np.ndarray, "u p"], costs: Float[np.ndarray, "u p"], price: float) -> Int[np.ndarray, " u"]:
    """What each unit takes at a price; of equals the cheaper, at no end to the price the better of the cheapest."""
    first, second = costs, scores
    if not math.isinf(price):
        first, second = scores + price * np.where(np.isfinite(scores), costs, 0.0), costs
    taken: Int[np.ndarray, " u"] = np.where(first == first.min(axis=1, keepdims=True), second, np.inf).argmin(axis=1)
    return taken


def _cost(costs: Float[np.ndarray, "u p"], choice: Int[np.ndarray, " u"]) -> float:
    return math.fsum(costs[np.arange(len(costs)), choice])


def _least_price(scores: Float[np.ndarray, "u p"], costs: Float[np.ndarray, "u p"], limit: float) -> float:
    """The least price, to the last bit, whose choice fits; infinite where only the cheapest options fit."""
    if within(_cost(costs, _at(scores, costs, 0.0)), limit):
        return 0.0
    low, high = 0.0, 1.0
    while not within(_cost(costs, _at(scores, costs, high)), limit):
        low, high = high, 2 * high
        if high > 1e300:
            return math.inf
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        fits = within(_cost(costs, _at(scores, costs, middle)), limit)
        low, high = (low, middle) if fits else (middle, high)
    return high


def _dual(scores: Float[np.ndarray, "u p"], costs: Float[np.ndarray, "u p"], limit: float, price: float) -> float:
    if math.isinf(price):
        return -math.inf
    finite = np.where(np.isfinite(scores), costs, 0.0)
    return math.fsum((scores + price * finite).min(axis=1)) - price * limit


def _fill(problem: Problem, choice: Int[np.ndarray, " u"], resource: str) -> Int[np.ndarray, " u"]:
    """Spend what is left: while one fits, the upgrade of the largest drop in score for its cost."""
    costs = np.where(problem.allowed, problem.costs[resource], np.inf)
    scores = np.where(problem.allowed, problem.scores, np.inf)
    rows, choice, budget = np.arange(len(costs)), choice.copy(), problem.budgets[resource]
    while True:
        left = budget - math.fsum(costs[rows, choice])
        extra = costs - costs[rows, choice][:, None]
        drop = scores[rows, choice][:, None] - scores
        able = (drop > 0) & (extra <= left + 1e-12 * abs(budget))
        if not able.any():
            return choice
        worth = np.where(able, np.inf, -np.inf)  # what costs nothing comes first
        np.divide(drop, extra, out=worth, where=able & (extra > 0))
        unit, option = np.unravel_index(int(worth.argmax()), worth.shape)
        choice[unit] = option


def _steps(scores: Float[np.ndarray, " p"], costs: Float[np.ndarray, " p"], unit: int) -> list[tuple[float, int, int]]:
    """The moves along a unit's own lower hull, from its cheapest option on: (slope, unit, option)."""
    steps: list[tuple[float, int, int]] = []
    at = int(np.where(costs == costs.min(), scores, np.inf).argmin())
    while True:
        extra, drop = costs - costs[at], scores[at] - scores
        able = np.isfinite(costs) & (extra > 0) & (drop > 0)
        if not able.any():
            return steps
        slope = np.where(able, -drop / np.where(able, extra, 1.0), np.inf)
        best = np.flatnonzero(slope == slope.min())
        at = int(best[np.argmax(costs[best])])
        steps.append((float(slope.min()), unit, at))
