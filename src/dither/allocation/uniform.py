"""One option for all units: what every allocation has to beat."""

from dither.allocation.problem import Problem, Solution
from dither.errors import InputError


def uniform(problem: Problem) -> Solution:
    """The option of least score that all units can have within the budgets.

    Raises:
        InputError: there is none.
    """
    units, options = problem.scores.shape
    fitting = [(option,) * units for option in range(options) if problem.fits((option,) * units)]
    if not fitting:
        raise InputError("no option fits the budget when all units have it; ask for more, or offer smaller options")
    choice = min(fitting, key=problem.score)
    return Solution(choice, problem.score(choice), float("-inf"), "uniform", "best of the uniform")
