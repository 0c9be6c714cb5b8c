"""Allocate to a target: as few bits as leave a share of the model's own predictions as they were.

Source: arXiv 2306.04879 (see `allocation/bisection.py`): a sensitivity orders the units, real evaluations decide.
Departs from it: accuracy is agreement with the full-precision model's own predictions on the calibration data, which
needs no labels; weights are rounded to nearest meanwhile, so that a better method keeps more than was asked for,
unless `method` is one that solves layers one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from dither.allocation.allocation import Allocation
from dither.allocation.bisection import Choice, bisect, greedy
from dither.allocation.problem import Problem, Solution
from dither.allocation.table import SIZE, Option, ScoreTable
from dither.errors import InputError
from dither.models.gradients import NOT_RESIDENT
from dither.models.losses import class_rows
from dither.sensitivities import parse_sensitivity
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.choice import chosen
from dither.sensitivities.outputs import stored_codes
from dither.sensitivities.swap import fit_inputs
from dither.sensitivity import measure

OPTIONS = ("none", "int8", "int4")  # the papers' 16, 8 and 4 bits
_FULL = 16
How = Literal["bisection", "greedy"]


@dataclass(frozen=True)
class Search:
    """A sensitivity that also searches, by real evaluations, in the order that another one gives."""

    name: ClassVar[str] = "search"
    about: ClassVar[str] = "bisection of the agreement with the full-precision model"

    by: str
    accuracy: float
    how: How = "bisection"

    def measure(self, probe: Probe) -> Measured:
        """The other's scores; what was evaluated is among the facts."""
        if probe.network.weights is not None:
            raise InputError(f"{self.name}: {NOT_RESIDENT}")
        found = parse_sensitivity(self.by).measure(probe)
        bits = [_bits(option) for option in probe.options]
        steps = sorted((p for p in range(len(bits)) if bits[p] < max(bits)), key=lambda p: -bits[p])
        full = probe.options.index(Option(None)) if Option(None) in probe.options else -1
        if full < 0 or not steps:
            raise InputError(
                "an accuracy needs full precision among the options, and something smaller: none,int8,int4"
            )
        finite = np.where(np.isfinite(found.scores), found.scores, 0.0)
        harm = finite[:, steps[-1]]
        if steps[-1] in found.pairs:  # half of what a unit shares with each other one, with M_ij = M_ji
            harm = harm + found.pairs[steps[-1]].sum(axis=1) / 2
        order = [int(u) for u in np.argsort(harm, kind="stable")]
        evaluate = _Agreement(probe)
        walk = bisect if self.how == "bisection" else greedy
        cost = partial(_code_bits, probe, bits)
        start = (full,) * len(probe.units)
        walk(order, steps, start, evaluate, cost, self.accuracy, lambda unit, option: bool(probe.able[unit, option]))
        tried = [{"choice": list(choice), "agreement": value} for choice, value in evaluate.known.items()]
        return replace(found, facts={**found.facts, "start": list(start), "evaluations": tried})


class _Agreement:
    """The share of rows whose most likely class is that of the full-precision model, for a choice of options."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.known = probe, dict[Choice, float]()
        self.stored, self.quantizers = stored_codes(probe), fit_inputs(probe)
        with torch.no_grad():
            self.wanted = [class_rows(probe.network.run(batch)).argmax(dim=1) for batch in probe.batches]

    def __call__(self, choice: Choice) -> float:
        key = "choice " + ".".join(map(str, choice))
        value = self.probe.kept(key, partial(self._measure, choice))
        self.known[choice] = value
        self.probe.say("accuracy", len(self.known), len(self.known))
        return value

    @torch.no_grad()
    def _measure(self, choice: Choice) -> float:
        probe, same, total = self.probe, 0, 0
        with chosen(probe, self.stored, self.quantizers, choice):
            for batch, wanted in zip(probe.batches, self.wanted, strict=True):
                same += int((class_rows(probe.network.run(batch)).argmax(dim=1) == wanted).sum())
                total += len(wanted)
        return same / total


def allocate_to_accuracy(
    model: str | Path | nn.Module,
    calibration: Any,
    accuracy: float,
    *,
    by: str = "augmented",
    cost: str = SIZE,
    search: How = "bisection",
    options: Sequence[str] | None = None,
    **how: Any,
) -> tuple[ScoreTable, Allocation]:
    """The cheapest evaluated choice with which `accuracy` of the predictions stay as they were, by `cost`.

    `by` orders the units, `how` is as in `dither.sensitivity.measure`. With a folder `scores` evaluations are kept.

    Raises:
        InputError: no accuracy between 0 and 1, no such cost, or what `measure` refuses.
    """
    if not 0 < accuracy <= 1:
        raise InputError(f"an accuracy is a share of predictions such as 0.99, got {accuracy:g}")
    table = measure(model, Search(by, accuracy, search), calibration, options=options or OPTIONS, **how)
    if cost not in table.costs:
        raise InputError(f"there is no cost {cost!r} in the table; it has {', '.join(table.costs)}")
    return table, cheapest(table, accuracy, cost, search)


def cheapest(table: ScoreTable, accuracy: float, cost: str, solver: str) -> Allocation:
    """Of all that was evaluated for a table, the choice that meets an accuracy at least cost."""
    rows = np.arange(len(table.units))

    def spent(choice: Sequence[int]) -> float:
        return math.fsum(table.costs[cost][rows, list(choice)])

    tried = table.facts["evaluations"]
    able = [(one["choice"], one["agreement"]) for one in tried if one["agreement"] >= accuracy]
    choice, agreement = min([(table.facts["start"], 1.0), *able], key=lambda one: spent(one[0]))
    problem = Problem(table.scores, table.costs, {cost: spent(choice)})
    status = f"agreement {agreement:.4f} after {len(tried)} evaluations"
    solution = Solution(tuple(choice), problem.score(choice), -math.inf, solver, status)
    return replace(Allocation.of(table, problem, solution), requested={"accuracy": accuracy})


def _bits(option: Option) -> int:
    return _FULL if option.weights is None else option.weights.bits


def _code_bits(probe: Probe, bits: Sequence[int], choice: Choice) -> float:
    return float(sum(unit.parameters * bits[place] for unit, place in zip(probe.units, choice, strict=True)))
