"""verified: what an allocation does to a model's predictions, beside formats mixed evenly at the same size."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dither.allocation.allocation import Allocation
from dither.allocation.even import even
from dither.allocation.problem import Problem
from dither.allocation.table import SIZE, ScoreTable
from dither.by_classes import Judge
from dither.errors import InputError
from dither.sensitivity import measure


@dataclass(frozen=True)
class Verdict:
    """Mean divergence from the full-precision predictions, in nats a sample or token, and stored bits a weight.

    `even` is None where no format fits when all units have it.
    """

    allocation: float
    bits: float
    even: float | None
    even_bits: float | None

    @property
    def gains(self) -> bool | None:
        """Whether the allocation moves predictions less than the even mix; None where there is none."""
        return None if self.even is None else self.allocation < self.even

    def text(self) -> str:
        """One line of what was found."""
        found = f"predictions diverge by {self.allocation:.3g} nats at {self.bits:.4f} bits a weight"
        if self.even is None:
            return f"{found}; no format fits everywhere, so there is nothing to compare with"
        word = "less" if self.gains else "no less"
        return f"{found}, {word} than the {self.even:.3g} of formats mixed evenly at {self.even_bits:.4f}"


def verified(
    model: str | Path | nn.Module, calibration: Any, table: ScoreTable, allocation: Allocation, **how: Any
) -> tuple[Allocation, Verdict]:
    """The allocation with what it does to predictions among its facts, under `verified`.

    `how` is as in `measure` when the table was made, so that weights are those of `method`, solved on the same samples;
    they are judged on a third draw of the same data (the seed after the next), which overlaps where these are few.
    """
    places = {str(option): place for place, option in enumerate(table.options)}
    choice = tuple(places[str(allocation.units[unit.name])] for unit in table.units)
    costs = {SIZE: table.costs[SIZE]}
    size = Problem(table.scores, costs, {SIZE: float("inf")}).spent(choice)[SIZE]
    problem = Problem(table.scores, costs, {SIZE: size})
    rival = _rival(problem)
    wanted = tuple(dict.fromkeys([choice] if rival is None else [choice, rival]))
    asked = dict(how) | {"judge_seed": how.get("seed", 0) + 2}
    found: Mapping[tuple[int, ...], float] = dict(
        zip(wanted, measure(model, Judge(wanted), calibration, **asked).facts["kl"], strict=True)
    )
    verdict = Verdict(
        found[choice], size / table.parameters,
        None if rival is None else found[rival],
        None if rival is None else problem.spent(rival)[SIZE] / table.parameters,
    )  # fmt: skip
    seen = {
        "kl": verdict.allocation,
        "even_kl": verdict.even,
        "even_bits": verdict.even_bits,
        "judge_seed": asked["judge_seed"],
    }
    return replace(allocation, facts={**allocation.facts, "verified": seen}), verdict


def _rival(problem: Problem) -> tuple[int, ...] | None:
    try:
        return even(problem).choice
    except InputError:
        return None
