"""Two neighbouring formats mixed evenly: what one has without measuring anything, at any size."""

import math

from dither.allocation.problem import Problem, Solution
from dither.errors import InputError


def even(problem: Problem) -> Solution:
    """The larger of two formats wherever its share of what the budget leaves lags behind, in execution order.

    The smaller is the largest that all units can have within the budget, the larger the next; where the budget is just
    that of the smaller, all units have it.

    Raises:
        InputError: no format fits when all units have it, or there are several budgets.
    """
    resource = problem.only_resource
    costs, most = problem.costs[resource], problem.budgets[resource]
    order = [int(p) for p in problem.largest_first(resource) if problem.allowed[:, p].all()][::-1]
    fitting = [place for place, option in enumerate(order) if problem.fits((option,) * len(costs))]
    if not fitting:
        raise InputError("no option fits the budget when all units have it; ask for more, or offer smaller options")
    low = order[fitting[-1]]
    high = order[min(fitting[-1] + 1, len(order) - 1)]
    least, extra = costs[:, low].sum(), costs[:, high] - costs[:, low]
    share = (most - least) / extra.sum() if extra.sum() > 0 else 0.0
    taken, due, choice = 0.0, 0.0, []
    for more in extra.tolist():
        due += share * more
        larger = taken + more / 2 <= due and least + taken + more <= most
        taken += more * larger
        choice.append(high if larger else low)
    return Solution(tuple(choice), problem.score(choice), -math.inf, "even", "two formats mixed evenly")
