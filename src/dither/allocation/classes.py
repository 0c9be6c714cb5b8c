"""Budgets split between classes of units whose scores are of different metrics, and promotion by rank.

Source: MixDQ (Zhao et al., ECCV 2024, arXiv 2405.17873): content layers are scored by structural similarity, quality
layers by the error of the output; each class has an integer program of its own, and the split of the budget that gives
the best pictures is chosen from a scan. ViDiT-Q (arXiv 2406.02540): budgets of groups and time ranges by the error of
quantizing a whole group, then the most sensitive units of each group get more bits until its budget is used.
Departs from MixDQ's code: budgets are upper limits (there a band of ±2 %), every solver of the library serves, a split
that cannot be met is left out and said, and the best of all is judged by the caller's own measure. Scores are costs:
signal-to-noise ratios in decibels have to be turned into noise powers first, as sums of decibels are products.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from dither.allocation.problem import Problem, Solution, Solver
from dither.errors import InputError


def noise_of_decibels(ratio: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The noise power over the signal power of signal-to-noise ratios in decibels: less is better, and it adds up."""
    found: Float[np.ndarray, ...] = 10.0 ** (-ratio / 10.0)
    return found


def split_average(average: float, ratio: float, share: float) -> tuple[float, float]:
    """Mean bits (a, b) of two classes with a = ratio b and share a + b = average (share + 1).

    `share` is the first class's weights over the second's.
    """
    second = average * (1 + share) / (ratio * share + 1)
    return ratio * second, second


@dataclass(frozen=True)
class Split:
    """A split of the budget, the choice that it leads to, and what the caller measured of it."""

    ratio: float
    averages: tuple[float, float]
    choice: tuple[int, ...]
    measured: float


@dataclass(frozen=True)
class Scan:
    """The best split first, and why others were left out."""

    splits: tuple[Split, ...]
    refused: Mapping[float, str]


def solve_parts(
    problem: Problem, part_of: Int[np.ndarray, " u"], budgets: Mapping[int, float], resource: str, solver: Solver
) -> Solution:
    """One program for each class, each with its own budget of a resource.

    Raises:
        InputError: a class's budget cannot be met; the message names it.
    """
    choice, score, bound = np.zeros(len(part_of), dtype=np.int64), 0.0, 0.0
    for part, budget in budgets.items():
        rows = np.flatnonzero(part_of == part)
        costs = {name: values[rows] for name, values in problem.costs.items()}
        priority = None if problem.priority is None else problem.priority[rows]
        try:
            found = solver(Problem(problem.scores[rows], costs, {resource: budget}, priority))
        except InputError as error:
            raise InputError(f"class {part}: {error}") from None
        choice[rows] = found.choice
        score, bound = score + found.score, bound + found.bound
    return Solution(tuple(int(one) for one in choice), score, bound, "classes", "each class by itself")


def scan_splits(
    problem: Problem,
    first: Sequence[bool],
    weights: Float[np.ndarray, " u"],
    average: float,
    ratios: Sequence[float],
    resource: str,
    solver: Solver,
    judge: Callable[[tuple[int, ...]], float],
) -> Scan:
    """Every ratio of the classes' mean bits in turn: solve each class, let `judge` measure the choice (least is best).

    `weights` counts each unit's weights; `average` is of bits of `resource` a weight.

    Raises:
        InputError: no split can be met.
    """
    part_of = np.where(np.asarray(first), 0, 1)
    masses = [float(weights[part_of == part].sum()) for part in (0, 1)]
    splits, refused = [], dict[float, str]()
    for ratio in ratios:
        averages = split_average(average, ratio, masses[0] / masses[1])
        budgets = {part: mean * mass for part, (mean, mass) in enumerate(zip(averages, masses, strict=True))}
        try:
            choice = solve_parts(problem, part_of, budgets, resource, solver).choice
        except InputError as error:
            refused[ratio] = str(error)
            continue
        splits.append(Split(ratio, averages, choice, judge(choice)))
    if not splits:
        raise InputError(f"no split of {average:g} bits can be met: {next(iter(refused.values()), 'no ratio given')}")
    return Scan(tuple(sorted(splits, key=lambda one: one.measured)), refused)


def budgets_by_error(
    errors: Float[np.ndarray, " g"], weights: Float[np.ndarray, " g"], average: float, low: float, high: float
) -> Float[np.ndarray, " g"]:
    """Mean bits of groups (or groups in ranges of time) from the error of quantizing each whole group.

    Bits are such that error 4^-bits is the same for each weight, between `low` and `high`; their mean over all weights
    is `average`.

    Raises:
        InputError: the average is not between the two.
    """
    if not low <= average <= high:
        raise InputError(f"expected an average between {low:g} and {high:g} bits, got {average:g}")
    ideal = np.log2(np.maximum(errors, 1e-300) / weights) / 2
    bottom, top = float(ideal.min()) - high, float(ideal.max()) - low
    for _ in range(200):
        level = (bottom + top) / 2
        used = float((weights * np.clip(ideal - level, low, high)).sum())
        bottom, top = (level, top) if used > average * float(weights.sum()) else (bottom, level)
    found: Float[np.ndarray, " g"] = np.clip(ideal - top, low, high)
    return found


def promote(problem: Problem, base: Sequence[int], better: Sequence[int], rank: Float[np.ndarray, " u"]) -> Solution:
    """From the options `base` on, give the units of largest `rank` their `better` option while the budgets allow it.

    A unit that does not fit is passed over, those behind it are still tried.

    Raises:
        InputError: even `base` exceeds a budget.
    """
    choice = list(base)
    if not problem.fits(choice):
        raise InputError("the options to begin with exceed the budget; begin with smaller ones")
    for unit in np.argsort(-rank, kind="stable").tolist():
        trial = [better[unit] if other == unit else option for other, option in enumerate(choice)]
        if problem.fits(trial):
            choice = trial
    return Solution(tuple(choice), problem.score(choice), -math.inf, "promotion", "by rank")


def promote_by_group(
    problem: Problem,
    part_of: Int[np.ndarray, " u"],
    budgets: Mapping[int, float],
    resource: str,
    base: Sequence[int],
    better: Sequence[int],
    rank: Float[np.ndarray, " u"],
) -> Solution:
    """`promote` within each group (or group and range of time) and its own budget of a resource.

    Raises:
        InputError: the options to begin with exceed a group's budget.
    """
    choice = np.array(base)
    for part, budget in budgets.items():
        rows = np.flatnonzero(part_of == part)
        costs = {name: values[rows] for name, values in problem.costs.items()}
        own = replace(problem, scores=problem.scores[rows], costs=costs, budgets={resource: budget}, priority=None)
        choice[rows] = promote(
            own, [base[u] for u in rows.tolist()], [better[u] for u in rows.tolist()], rank[rows]
        ).choice
    final = tuple(int(one) for one in choice)
    return Solution(final, problem.score(final), -math.inf, "promotion", "by rank in each group")
