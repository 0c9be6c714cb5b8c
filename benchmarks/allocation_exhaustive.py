"""The true best of all choices for a few units, and where allocators' choices stand among them."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from allocation_bench import WIDTHS, Bench, scored_by
from allocation_searches import searches

from dither.allocating import allocator_named
from dither.allocation.problem import Problem
from dither.allocation.solve import solver_named
from dither.allocation.table import SIZE, Option, Unit
from dither.errors import DitherError
from dither.models.losses import class_rows
from dither.pipeline import begin
from dither.recipe import parse_method
from dither.sensitivities.base import Probe
from dither.sensitivities.solved import Solved
from dither.sensitivities.swap import replaced
from dither.statistics.divergence import kl_rows

PAIR = [WIDTHS.index(2), WIDTHS.index(4)]


def exhaustive(bench: Bench, method: str) -> dict[str, Any]:
    """KL of every choice of 2 or 4 bits for a few units, the rest in full precision, and of allocators' choices."""
    scores = bench.table("error", 0)
    places = sorted({round(x) for x in np.linspace(0, len(scores.units) - 1, bench.given.units)})
    units = tuple(scores.units[place] for place in places)
    true = divergences(bench, method, units, tuple(scores.options[place] for place in PAIR))
    found: dict[str, Any] = {
        "model": bench.name, "method": method, "units": [unit.name for unit in units], "choices": len(true),
        "allocators": {},
    }  # fmt: skip
    for allocator in (one for one in bench.given.allocators if not searches(one)):
        if (scored := scored_by(allocator))[1] not in ("rtn", method):
            continue
        try:
            scores = bench.table(allocator, 0)
            costs, pairs = scores.costs[SIZE][places][:, PAIR], np.ix_(places, places)
            problem = Problem(
                scores.scores[places][:, PAIR], {SIZE: costs}, {SIZE: costs.mean() * len(places)},
                None if scores.priority is None else scores.priority[places],
                {to: scores.pairs[p][pairs] for to, p in enumerate(PAIR) if p in scores.pairs},
            )  # fmt: skip
            choice = solver_named(allocator_named(scored[0]).solver)(problem).choice
        except DitherError as error:
            print(f"{allocator}: {error}", flush=True)
            continue
        fitting = sorted(value for one, value in true.items() if problem.fits(one))
        filled = [value for one, value in true.items() if problem.fits(one) and full(problem, one)]
        found["allocators"][allocator] = {"kl": true[choice], "rank": fitting.index(true[choice]) + 1}
        found |= {"best": fitting[0], "fitting": len(fitting), "random": float(np.mean(filled))}
    return found


@torch.no_grad()
def divergences(
    bench: Bench, method: str, units: tuple[Unit, ...], options: tuple[Option, ...]
) -> dict[tuple[int, ...], float]:
    """Mean KL on evaluation data of each choice of options, with the weights that the method solves."""
    solver = parse_method(method, {})
    with TemporaryDirectory() as folder:
        solved = None if solver.alone(solver.weights) is None else Solved(solver, Path(folder))
        probed(bench, bench.given.calibration, bench.given.samples, units, options, solved).solve()
        probe = probed(bench, bench.given.evaluation, 8 if bench.text else bench.given.count, units, options, solved)
        stored = [
            [{name: probe.stored(name, p) for name in unit.layers} for p in range(len(options))] for unit in units
        ]
    references = [class_rows(probe.network.run(batch)) for batch in probe.batches]

    def divergence(choice: Sequence[int]) -> float:
        weights = {name: w for row, option in enumerate(choice) for name, w in stored[row][option].items()}
        with replaced(probe, weights, {}):
            pairs = zip(references, probe.batches, strict=True)
            return float(torch.cat([kl_rows(ref, class_rows(probe.network.run(batch))) for ref, batch in pairs]).mean())

    return {choice: divergence(choice) for choice in itertools.product(range(len(options)), repeat=len(units))}


def probed(
    bench: Bench, data: str, count: int | None, units: tuple[Unit, ...], options: tuple[Option, ...],
    solved: Solved | None,
) -> Probe:  # fmt: skip
    """The full-precision network on data."""
    run, _ = begin(
        bench.given.model, parse_method("rtn", {}), data, count, 0, bench.given.batch_size, bench.given.device,
        bench.given.length if bench.text else None, None,
    )  # fmt: skip
    able = np.ones((len(units), len(options)), bool)
    return Probe(run.network, run.anatomy, run.data.batches, units, options, able, solved=solved)


def full(problem: Problem, choice: Sequence[int]) -> bool:
    """Whether no unit could have more bits."""
    more = [
        tuple(1 if unit == raised else o for unit, o in enumerate(choice)) for raised, o in enumerate(choice) if not o
    ]
    return not any(problem.fits(one) for one in more)
