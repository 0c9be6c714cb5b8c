"""Bisection to a target: how many of the least sensitive units can have fewer bits before a real metric falls too far.

Source: Schaefer et al., Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
Quantization, arXiv 2306.04879 (guided bisection), and Mixed Precision Post Training Quantization of Neural Networks
with Sensitivity Guided Search, arXiv 2302.01382 (greedy). The papers' text was not at hand: this is built from their
abstracts.
Departs from them: real metrics do not fall evenly, so the cheapest of all configurations that met the target is kept,
whatever the bisection ends at; no configuration is measured twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dither.errors import InputError

Choice = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The option of each unit, its metric and cost, and how often the metric was measured."""

    choice: Choice
    metric: float
    cost: float
    evaluations: int


class _Search:
    """What was measured so far, and the cheapest of it that met the target."""

    def __init__(
        self, evaluate: Callable[[Choice], float], cost: Callable[[Choice], float], target: float, start: Choice
    ) -> None:
        self.evaluate, self.cost, self.target = evaluate, cost, target
        self.known: dict[Choice, float] = {}
        self.start = start

    def meets(self, choice: Choice) -> bool:
        """Whether a configuration meets the target; the start does by definition."""
        if choice == self.start:
            return True
        if choice not in self.known:
            self.known[choice] = self.evaluate(choice)
        return self.known[choice] >= self.target

    def found(self) -> Found:
        """The cheapest that met the target."""
        able = [choice for choice, metric in self.known.items() if metric >= self.target]
        best = min([self.start, *able], key=self.cost)
        return Found(best, self.known.get(best, float("nan")), float(self.cost(best)), len(self.known))


def bisect(
    order: Sequence[int],
    steps: Sequence[int],
    start: Choice,
    evaluate: Callable[[Choice], float],
    cost: Callable[[Choice], float],
    target: float,
    able: Callable[[int, int], bool] = lambda unit, option: True,
) -> Found:
    """Give units of `order` (least sensitive first) the options `steps`, one after the other, while the target is met.

    Units reach an option only if they reached the one before; `able(unit, option)` says what a unit can have. At most
    len(steps) * ceil(log2(len(order) + 1)) evaluations. `start` is taken to meet the target: it is full precision.

    Raises:
        InputError: `order` does not name every unit once.
    """
    if sorted(order) != list(range(len(start))):
        raise InputError(f"the order has to name each of {len(start)} units once")
    search, config, eligible = _Search(evaluate, cost, target, start), start, list(order)
    for step in steps:
        eligible = [unit for unit in eligible if able(unit, step)]
        low, high = 0, len(eligible)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if search.meets(_with(config, eligible[:middle], step)) else (low, middle - 1)
        config, eligible = _with(config, eligible[:low], step), eligible[:low]
    return search.found()


def greedy(
    order: Sequence[int],
    steps: Sequence[int],
    start: Choice,
    evaluate: Callable[[Choice], float],
    cost: Callable[[Choice], float],
    target: float,
    able: Callable[[int, int], bool] = lambda unit, option: True,
) -> Found:
    """As `bisect`, one unit at a time: a unit that breaks the target keeps what it had; len(order) evaluations each."""
    search, config = _Search(evaluate, cost, target, start), start
    eligible = list(order)
    for step in steps:
        reached = []
        for unit in (unit for unit in eligible if able(unit, step)):
            trial = _with(config, [unit], step)
            if search.meets(trial):
                config = trial
                reached.append(unit)
        eligible = reached
    return search.found()


def _with(choice: Choice, units: Sequence[int], option: int) -> Choice:
    changed = set(units)
    return tuple(option if unit in changed else before for unit, before in enumerate(choice))
