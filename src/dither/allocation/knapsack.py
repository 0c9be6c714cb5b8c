"""The exact choice within one or several budgets: a mixed-integer program, solved by HiGHS.

Scaling decides whether HiGHS sees the problem at all: it neglects coefficients below its absolute tolerances (1e-6 and
1e-7), and then calls optimal what a greedy choice beats. So scores are counted from each unit's least and in units that
make the optimum about 1,000 (by the Lagrangian bound), costs in thousandths of the largest; options that another one
beats are left out; the answer is compared with the Lagrangian one and checked against the budgets as they were given.

Source: scipy.optimize.milp (HiGHS, Huangfu and Hall 2018); HAWQ-V3 (arXiv 2011.10680) states the same program.
"""

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from dither.allocation.lagrangian import lagrangian
from dither.allocation.problem import Problem, Solution
from dither.errors import InputError

_OPTIMUM = 1e3  # measured: 10 times more makes HiGHS slow on 10,000 units, 1,000 times less makes it wrong
_TIGHTER = (0.0, 1e-9, 1e-7, 1e-5)  # of a budget, where HiGHS' feasibility tolerance let a choice exceed it
_TIME_LIMIT_S = 60.0
_INFEASIBLE = 2  # scipy's status


def knapsack(problem: Problem, time_limit_s: float = _TIME_LIMIT_S) -> Solution:
    """The choice of least score within all budgets, or the best found in `time_limit_s` with what is proven of it.

    Raises:
        InputError: each budget can be met, but not all together.
    """
    relaxed = [lagrangian(replace(problem, budgets={name: budget})) for name, budget in problem.budgets.items()]
    lowest = max(one.bound for one in relaxed)
    known = [one for one in relaxed if problem.fits(one.choice)]
    for one in known:
        if one.score <= lowest:
            return replace(one, solver="milp", status="optimal")
    found, status, bound = _highs(problem, lowest, time_limit_s)
    choices = [one.choice for one in known] + ([] if found is None else [found])
    if not choices:
        limits = ", ".join(f"{name} of {budget:.6g}" for name, budget in problem.budgets.items())
        why = "no choice meets them together" if status == "infeasible" else f"none was found in {time_limit_s:.0f} s"
        raise InputError(f"{limits}: {why}; relax one of them")
    best = min(choices, key=problem.score)
    score = problem.score(best)
    return Solution(best, score, float(min(max(bound, lowest), score)), "milp", status)


def _highs(problem: Problem, lowest: float, time_limit_s: float) -> tuple[tuple[int, ...] | None, str, float]:
    """The choice, HiGHS' word for it, and the bound it proved."""
    useful = problem.useful()
    floor = np.where(problem.allowed, problem.scores, np.inf).min(axis=1)
    base = math.fsum(floor)
    above = (problem.scores - floor[:, None])[useful]
    unit = (lowest - base) / _OPTIMUM if lowest > base else float(above.max(initial=0.0)) or 1.0
    for tighter in _TIGHTER:
        result = milp(
            above / unit,
            integrality=np.ones(int(useful.sum())),
            bounds=Bounds(0, 1),
            constraints=[_one_each(useful), *_limits(problem, useful, tighter)],
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
        if result.x is None:
            return None, "infeasible" if result.status == _INFEASIBLE else "time limit", -math.inf
        taken = np.full(useful.shape, -1.0)
        taken[useful] = result.x
        choice = tuple(int(option) for option in taken.argmax(axis=1))
        if problem.fits(choice):
            proven = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
            bound = base + proven * unit if tighter == 0 else -math.inf
            word = "time limit" if result.status else "optimal" if tighter == 0 else "within its bound"
            return choice, word, bound
    return None, "exceeds a budget by rounding", -math.inf


def _one_each(useful: Bool[np.ndarray, "u p"]) -> LinearConstraint:
    """One option a unit."""
    unit = np.nonzero(useful)[0]
    matrix = csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))), shape=(len(useful), len(unit)))
    return LinearConstraint(matrix, 1, 1)


def _limits(problem: Problem, useful: Bool[np.ndarray, "u p"], tighter: float) -> list[LinearConstraint]:
    """A row for each budget, counted from the cheapest choice so that small options are not lost beside large ones."""
    rows = []
    for name, budget in problem.budgets.items():
        costs = problem.costs[name]
        least: Float[np.ndarray, " u"] = np.where(useful, costs, np.inf).min(axis=1)
        extra = (costs - least[:, None])[useful]
        unit = (float(extra.max(initial=0.0)) or 1.0) / _OPTIMUM
        left = budget - math.fsum(least) - tighter * abs(budget)
        rows.append(LinearConstraint((extra / unit)[None, :], -np.inf, left / unit))
    return rows
