"""Allocate by a beam search: sums of scores lead it, real evaluations of partial choices correct it.

Source: `allocation/beam.py`. Evaluations are divergences of predictions from the full-precision model's, on the
calibration data, with the weights that `method` gives.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from dither.allocating import budgets
from dither.allocation.allocation import Allocation
from dither.allocation.beam import beam
from dither.allocation.problem import Problem, Solution
from dither.allocation.solve import problem_of
from dither.allocation.table import SIZE, ScoreTable
from dither.by_classes import divergence
from dither.errors import InputError
from dither.recipe import read_setting
from dither.sensitivities import parse_sensitivity
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.blocks import Damage
from dither.sensitivities.outputs import stored_codes
from dither.sensitivities.swap import fit_inputs
from dither.sensitivities.units import Traced, fixed_parts, unit_costs
from dither.sensitivity import measure

NAME = "dp-beam"


@dataclass(frozen=True)
class BeamSearch:
    """A sensitivity that also searches, within `bits` a weight or `size` bytes of the whole model.

    After every `every` units the best `beam` choices of each of `buckets` sizes are evaluated, and `keep` go on.
    """

    name: ClassVar[str] = NAME
    about: ClassVar[str] = "dynamic programming over scores, partial choices measured again together"

    by: str = "kl"
    every: int = 5
    buckets: int = 12
    beam: int = 4
    keep: int = 2
    bits: float | None = None
    size: float | None = None

    def measure(self, probe: Probe) -> Measured:
        """The scores of `by`; the choice and how far it moves predictions are among the facts."""
        if min(self.every, self.buckets, self.beam, self.keep) < 1:
            raise InputError(f"{NAME}: every, buckets, beam and keep are at least 1")
        found = parse_sensitivity(self.by).measure(probe)
        costs = unit_costs(probe.network, probe.units, probe.options, probe.able, Traced())
        fixed = fixed_parts(probe.network, probe.anatomy, probe.units)
        table = ScoreTable(probe.units, probe.options, found.scores, {SIZE: costs[SIZE]}, fixed)
        problem = problem_of(table, budgets(table, self.bits, self.size))
        return Measured(
            found.scores, found.errors, found.priority, facts={**found.facts, **self._search(probe, problem)}
        )

    @torch.no_grad()
    def _search(self, probe: Probe, problem: Problem) -> dict[str, Any]:
        judge = partial(divergence, probe, stored_codes(probe), fit_inputs(probe), Damage(probe, NAME))
        count = 0

        def judged(choices: Any) -> list[float]:
            nonlocal count
            count += len(choices)
            return list(probe.each(NAME, judge, {f"choice {'.'.join(map(str, one))}": one for one in choices}))

        choice, value = beam(problem, judged, self.every, self.buckets, self.beam, self.keep)
        return {"choice": list(choice), "kl": value, "evaluations": count}


def allocate_by_beam(
    model: str | Path | nn.Module,
    calibration: Any,
    text: str = NAME,
    *,
    bits: float | None = None,
    size: float | None = None,
    **how: Any,
) -> tuple[ScoreTable, Allocation]:
    """A table and an allocation by a text such as `dp-beam` or `dp-beam+by=quadratic+every=3`.

    `bits` and `size` are as in `dither.allocate`, `how` as in `dither.measure`.

    Raises:
        InputError: no such setting, or a budget that cannot be met.
    """
    settings = dict(read_setting(part) for part in text.split("+")[1:])
    allowed = ("by", "every", "buckets", "beam", "keep")
    if unknown := [key for key in settings if key not in allowed]:
        raise InputError(f"{NAME} has no setting {unknown[0]!r} (settings: {', '.join(allowed)})")
    table = measure(model, BeamSearch(**settings, bits=bits, size=size), calibration, **how)
    problem, choice = problem_of(table, budgets(table, bits, size)), tuple(table.facts["choice"])
    status = f"divergence {table.facts['kl']:.3g} after {table.facts['evaluations']} evaluations"
    return table, Allocation.of(table, problem, Solution(choice, problem.score(choice), -math.inf, NAME, status))
