"""Dynamic programming whose partial choices are measured again together, so that units need not be independent.

Units are added one by one; of the partial choices of like size those of least score stay. Every few units the best of
each size are measured as a whole, and what was measured takes the place of their sums.

Source: a re-implementation of ZeroQ's dynamic programming (arXiv 2001.00281), which re-measures every 5 layers the best
10 of each of 200 sizes and keeps 5.
Departs from it: fewer sizes and choices by default, as each costs a pass over the data; whoever beats nobody in cost
and score is not dropped before it was measured, only for want of room; at the end choices of all sizes are measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dither.allocation.problem import Problem, within

Choice = tuple[int, ...]
Judge = Callable[[Sequence[Choice]], Sequence[float]]
UNTOUCHED = -1  # instead of an option: a unit that stays as it is


@dataclass(frozen=True)
class _Partial:
    cost: float
    score: float
    choice: Choice


def beam(problem: Problem, judge: Judge, every: int, sizes: int, tried: int, kept: int) -> tuple[Choice, float]:
    """A choice within one budget and what `judge` says of it.

    `judge` measures choices of all units, in which those to come are `UNTOUCHED`; less is better. After every `every`
    units it gets the best `tried` of each of `sizes` intervals of cost, of which `kept` go on.

    Raises:
        InputError: there is more than one budget.
    """
    resource = problem.only_resource
    costs, useful, budget = problem.costs[resource], problem.useful(), problem.budgets[resource]
    least, most = (np.where(useful, costs, end) for end in (np.inf, -np.inf))
    low, high = least.min(axis=1), most.max(axis=1)
    ahead = np.concatenate([np.cumsum(low[::-1])[::-1][1:], [0.0]])  # what the units still to come take at least
    units, room = len(costs), [_Partial(0.0, 0.0, ())]
    for unit in range(units):
        grown = [
            _Partial(one.cost + costs[unit, p], one.score + problem.scores[unit, p], (*one.choice, int(p)))
            for one in room
            for p in np.flatnonzero(useful[unit])
        ]
        fitting = [one for one in grown if within(one.cost + ahead[unit], budget)]
        ends = float(low[: unit + 1].sum()), min(float(high[: unit + 1].sum()), budget - float(ahead[unit]))
        room = _best(fitting, ends, sizes, tried)
        if (unit + 1) % every == 0 or unit + 1 == units:
            whole = [one.choice + (UNTOUCHED,) * (units - unit - 1) for one in room]
            measured = zip(room, judge(whole), strict=True)
            room = _best([_Partial(one.cost, score, one.choice) for one, score in measured], ends, sizes, kept)
    best = min(room, key=lambda one: (one.score, one.cost))
    return best.choice, best.score


def _best(choices: Sequence[_Partial], ends: tuple[float, float], sizes: int, count: int) -> list[_Partial]:
    """The `count` of least score in each interval of cost."""
    width = (ends[1] - ends[0]) / sizes
    places: dict[int, list[_Partial]] = {}
    for one in sorted(choices, key=lambda one: (one.score, one.cost, one.choice)):
        place = min(max(int((one.cost - ends[0]) / width), 0), sizes - 1) if width > 0 else 0
        mine = places.setdefault(place, [])
        if len(mine) < count:
            mine.append(one)
    return [one for place in sorted(places) for one in places[place]]
