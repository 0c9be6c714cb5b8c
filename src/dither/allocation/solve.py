"""From a table and budgets to an allocation, by a solver that is chosen by name."""

from collections.abc import Mapping

from dither.allocation.allocation import Allocation
from dither.allocation.clusters import clustered
from dither.allocation.even import even
from dither.allocation.frontier import dynamic
from dither.allocation.knapsack import knapsack
from dither.allocation.lagrangian import lagrangian
from dither.allocation.monotone import monotone
from dither.allocation.pairwise import pairwise
from dither.allocation.problem import Problem, Solver, within
from dither.allocation.table import SIZE, ScoreTable
from dither.allocation.uniform import uniform
from dither.errors import InputError, nearest

SOLVERS: dict[str, Solver] = {
    "milp": knapsack,
    "lagrangian": lagrangian,
    "dp": dynamic,
    "hawq-v2": monotone,
    "uniform": uniform,
    "even": even,
    "pairwise": pairwise,
    "clusters": clustered,
}


def solver_named(name: str) -> Solver:
    """The solver of a name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver {name!r}{nearest(name, SOLVERS)} (known: {', '.join(SOLVERS)})")
    return SOLVERS[name]


def problem_of(table: ScoreTable, budgets: Mapping[str, float]) -> Problem:
    """The knapsack of a table within budgets, by resource; `size` is in bits of the units alone.

    Raises:
        InputError: a budget that cannot be met; the message says what can, and what share of the model is fixed.
    """
    if SIZE in budgets and table.parameters:
        _check_size(table, budgets[SIZE])
    return Problem(table.scores, table.costs, budgets, table.priority, table.pairs)


def solve(table: ScoreTable, budgets: Mapping[str, float], solver: str = "milp") -> Allocation:
    """The best allocation of a table within budgets, by resource; `size` is in bits of the units alone.

    Raises:
        InputError: `problem_of`'s, or the solver's.
    """
    problem = problem_of(table, budgets)
    solution = solver_named(solver)(problem)
    return Allocation.of(table, problem, solution)


def _check_size(table: ScoreTable, budget: float) -> None:
    """Refuse a size below the least, in the units that users ask in: bits a weight, and bytes of the whole model."""
    low, high = Problem(table.scores, table.costs, {SIZE: float("inf")}).range(SIZE)
    if within(low, budget):
        return
    asked, least, most = ((bits + table.fixed_bits) / 8 for bits in (budget, low, high))
    share = table.fixed_bits / (table.fixed_bits + high)
    raise InputError(
        f"a size of {asked:,.0f} bytes cannot be met: the model takes {least:,.0f} to {most:,.0f} "
        f"({budget / table.parameters:.4g} bits a weight asked for, {low / table.parameters:.4g} to "
        f"{high / table.parameters:.4g} possible; parts that are not chosen for take {table.fixed_bits // 8} bytes, "
        f"{share:.0%} of the largest model); ask for more, or offer smaller options"
    )
