"""Allocations whose classes of layers have measures and budgets of their own: MixDQ's and ViDiT-Q's steps, any model.

`mixdq`: two classes; an integer program for each at every split of the budget, and of these choices the one that moves
the model's predictions least. `vidit`: any number of classes; the divergence of quantizing a whole class to its
smallest format decides its budget, then the most sensitive units of each class get the largest format while it lasts.

Source: MixDQ (Zhao et al., ECCV 2024, arXiv 2405.17873) and ViDiT-Q (arXiv 2406.02540); see `allocation/classes.py`.
Departs from them: their measures are of pictures and videos (structural similarity, scores of quality and motion); here
each class has one of this library's, and choices are judged by the divergence of predictions on the calibration data.
ViDiT-Q's ranges of time steps are those of a sampler, which only it has: one range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from dither.allocating import budgets
from dither.allocation.allocation import Allocation
from dither.allocation.beam import UNTOUCHED
from dither.allocation.classes import budgets_by_error, promote_by_group, scan_splits
from dither.allocation.knapsack import knapsack
from dither.allocation.problem import Problem, Solution
from dither.allocation.solve import problem_of
from dither.allocation.table import SIZE, ScoreTable
from dither.errors import InputError
from dither.models.selection import matching
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.blocks import Damage
from dither.sensitivities.choice import chosen
from dither.sensitivities.outputs import Codes, stored_codes
from dither.sensitivities.swap import Quantizers, fit_inputs
from dither.sensitivity import measure

WAYS = ("mixdq", "vidit")
REST = "kl"
RATIOS = tuple(round(0.46 + 0.1 * step, 2) for step in range(10))  # of mean bits: MixDQ's scan for weights
_Choice = tuple[int, ...]


@dataclass(frozen=True)
class Judge:
    """The divergence of predictions under whole choices."""

    name: ClassVar[str] = "judge"
    about: ClassVar[str] = "divergence of predictions under choices of all units' options; a pass over the data each"

    choices: tuple[_Choice, ...]

    @torch.no_grad()
    def measure(self, probe: Probe) -> Measured:
        """No scores; the divergences are among the facts."""
        names = {f"choice {'.'.join(map(str, choice))}": choice for choice in self.choices}
        judge = partial(divergence, probe, stored_codes(probe), fit_inputs(probe), Damage(probe, self.name))
        found = list(probe.each("choices", judge, names))
        return Measured(np.where(probe.able, 0.0, np.inf), facts={"kl": found})


@torch.no_grad()
def divergence(probe: Probe, stored: Codes, quantizers: Quantizers, damage: Damage, choice: _Choice) -> float:
    """How far the predictions move when each unit is as its option of a choice."""
    with chosen(probe, stored, quantizers, choice):
        return damage()[0]


def allocate_by_classes(
    model: str | Path | nn.Module,
    calibration: Any,
    way: str,
    classes: Mapping[str, str],
    *,
    bits: float | None = None,
    size: float | None = None,
    rest: str = REST,
    **how: Any,
) -> tuple[ScoreTable, Allocation]:
    """A table and an allocation by `mixdq` (one class and the rest) or `vidit`.

    `classes` are patterns of layers, comma-separated, and the sensitivity that scores each; all other layers are the
    last class, scored by `rest`. `bits` and `size` are as in `dither.allocate`, `how` as in `dither.measure`.

    Raises:
        InputError: classes that overlap, are empty or hold all layers; a budget that cannot be met.
    """
    if way not in WAYS or not classes or (way == "mixdq" and len(classes) > 1):
        raise InputError(f"expected mixdq with one class beside the rest, or vidit, got {way} with {len(classes)}")
    tables = [measure(model, by, calibration, **how) for by in (*classes.values(), rest)]
    part_of = _parts(tables[-1], list(classes))
    rows = np.arange(len(part_of))
    scores = np.stack([one.scores for one in tables])[part_of, rows]
    table = replace(tables[-1], scores=scores, errors=None, priority=None, pairs={})
    problem = problem_of(table, budgets(table, bits, size))
    weights = np.array([float(unit.parameters) for unit in table.units])

    def judged(choices: Sequence[_Choice]) -> dict[_Choice, float]:
        wanted = tuple(dict.fromkeys(choices))
        found = measure(model, Judge(wanted), calibration, **how).facts["kl"]
        return dict(zip(wanted, found, strict=True))

    solve = _mixdq if way == "mixdq" else _vidit
    solution, seen = solve(problem, part_of, weights, judged)
    names = {unit.name: [*classes, "the rest"][part] for unit, part in zip(table.units, part_of.tolist(), strict=True)}
    facts = {**table.facts, "sensitivity": way, "measures": {**classes, "the rest": rest}, "classes": names, **seen}
    return table, Allocation.of(replace(table, facts=facts), problem, solution)


def _mixdq(
    problem: Problem, part_of: Int[np.ndarray, " u"], weights: Float[np.ndarray, " u"], judged: Any
) -> tuple[Solution, dict[str, Any]]:
    """The best of all splits, and what each led to."""
    average, first = problem.budgets[SIZE] / float(weights.sum()), (part_of == 0).tolist()
    choices: list[_Choice] = []

    def remember(choice: _Choice) -> float:
        choices.append(choice)
        return 0.0

    scan = partial(scan_splits, problem, first, weights, average, RATIOS, SIZE, knapsack)
    scan(remember)
    found = scan(judged(choices).__getitem__)
    best = found.splits[0]
    status = f"first class at {best.ratio:g} times the bits of the rest, best of {len(found.splits)} splits"
    splits = [{"ratio": s.ratio, "averages": list(s.averages), "kl": s.measured} for s in found.splits]
    seen = {"splits": splits, "refused": {f"{ratio:g}": reason for ratio, reason in found.refused.items()}}
    return Solution(best.choice, problem.score(best.choice), -np.inf, "mixdq", status), seen


def _vidit(
    problem: Problem, part_of: Int[np.ndarray, " u"], weights: Float[np.ndarray, " u"], judged: Any
) -> tuple[Solution, dict[str, Any]]:
    """Budgets of classes by the divergence of each in its smallest format, then promotion by rank."""
    costs, rows, parts = problem.costs[SIZE], np.arange(len(part_of)), range(int(part_of.max()) + 1)
    base = np.where(problem.allowed, costs, np.inf).argmin(axis=1)
    better = np.where(problem.allowed, costs, -np.inf).argmax(axis=1)
    whole = [tuple(np.where(part_of == part, base, UNTOUCHED).tolist()) for part in parts]
    known = judged(whole)
    errors = np.array([known[choice] for choice in whole])
    masses = np.array([weights[part_of == part].sum() for part in parts])
    means = [[costs[rows, option][part_of == part].sum() for part in parts] / masses for option in (base, better)]
    average = problem.budgets[SIZE] / float(weights.sum())
    shares = budgets_by_error(errors, masses, average, float(means[0].max()), float(means[1].max()))
    rank = problem.scores[rows, base] - problem.scores[rows, better]
    limits = {part: float(shares[part] * masses[part]) for part in parts}
    found = promote_by_group(problem, part_of, limits, SIZE, base.tolist(), better.tolist(), rank)
    seen = {"divergence_of_classes": errors.tolist(), "bits_of_classes": shares.tolist()}
    return replace(found, solver="vidit", status="budgets by divergence, largest formats by rank"), seen


def _parts(table: ScoreTable, classes: Sequence[str]) -> Int[np.ndarray, " u"]:
    """The class of each unit, that of the rest last."""
    member: dict[str, int] = {}
    for part, text in enumerate(classes):
        for name in (name for pattern in text.split(",") for name in matching(pattern.strip(), table.layers)):
            if member.setdefault(name, part) != part:
                raise InputError(f"{name} is in two classes, {classes[member[name]]!r} and {text!r}")
    found: list[int] = []
    for unit in table.units:
        parts = {member.get(name, len(classes)) for name in unit.layers}
        if len(parts) > 1:
            raise InputError(f"the layers of {unit.name} share a format, but are in {len(parts)} classes")
        found += parts
    if missing := set(range(len(classes) + 1)) - set(found):
        raise InputError("no layer is left for " + ("the rest" if len(classes) in missing else "a class"))
    return np.array(found)
