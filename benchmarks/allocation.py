"""Every allocator against one format everywhere, random allocations of equal size and, of few units, the true optimum.

    python benchmarks/allocation.py --model FOLDER --calibration DATA --evaluation DATA --bits 2.5 3 3.5 [--device cuda]

The budget at B bits is the size of B-bit codes everywhere, scales included; between two whole numbers it lies between
the sizes of both. `uniform` mixes these two formats evenly over the depth. Runs are added to
docs/results/allocation.json as they end, and those that are there are skipped, so that several models and interrupted
calls make one table; score tables are kept in --scores. .md and .svg show all of it.
"""

import argparse
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from allocation_report import plot, report

from dither.allocating import ALLOCATORS, allocator_named
from dither.allocation.allocation import Allocation
from dither.allocation.problem import Problem, Solution
from dither.allocation.solve import problem_of, solver_named
from dither.allocation.table import SIZE, ScoreTable
from dither.data import TextSet, open_data
from dither.errors import DitherError
from dither.evaluation.exam import open_exam
from dither.models.losses import class_rows
from dither.models.network import open_network
from dither.nn.linear import cache_weights
from dither.pipeline import begin, quantize
from dither.recipe import parse_method
from dither.sensitivities.base import Probe, stored_weight
from dither.sensitivities.swap import replaced
from dither.sensitivity import measure
from dither.statistics.divergence import kl_rows

BASELINES = ("uniform", "random")
WIDTHS = (2, 3, 4, 5, 6, 8)
TEXT, PICTURES = "int{bits}:g64:asym:minmax", "int{bits}:channel:asym:percentile"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of earlier calls, instead of running")
    parser.add_argument("--bits", nargs="+", type=float, default=[3.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument(
        "--allocators", nargs="+", default=list(ALLOCATORS), help="settings may follow: kl+symmetric=true"
    )
    parser.add_argument("--format", help="with {bits} in it (default: groups of 64 for text, channels for pictures)")
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws")
    parser.add_argument("--draws", type=int, default=10, help="random allocations")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--count", type=int, help="evaluation pictures or windows (default: all)")
    parser.add_argument("--units", type=int, default=8, help="of the exhaustive search; 0 leaves it out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a seed, 2 draws, little data")
    parser.add_argument("--out", type=Path, default=Path("docs/results/allocation"))
    parser.add_argument("--scores", type=Path, default=Path("build/allocation_scores"))
    given = parser.parse_args()
    if not given.merge and not (given.model and given.calibration and given.evaluation):
        parser.error("give --model, --calibration and --evaluation, or --merge")
    if given.quick:
        given.seeds, given.draws, given.samples, given.units = 1, 2, min(given.samples, 16), min(given.units, 5)
        given.count = given.count or 100
    return given


class Bench:
    """The full-precision model's answers, and score tables by allocator and calibration draw."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        network = open_network(given.model, given.device)
        self.name = network.name
        self.text = isinstance(open_data(given.evaluation), TextSet)
        self.exam = open_exam(network, given.evaluation, given.count).answered_by(network)
        self.format = given.format or (TEXT if self.text else PICTURES)
        self.options = [self.format.format(bits=bits) for bits in WIDTHS]
        self.tables: dict[tuple[str, int], ScoreTable] = {}

    def table(self, allocator: str, seed: int) -> ScoreTable:
        """Measured, or read where it was kept."""
        sensitivity = allocator_named("error" if allocator in BASELINES else allocator).sensitivity
        key = sensitivity, seed
        if key not in self.tables:
            self.tables[key] = measure(
                self.given.model, sensitivity, self.given.calibration, options=self.options,
                scores=self.given.scores, count=self.given.samples, seed=seed,
                length=self.given.length if self.text else None, batch_size=self.given.batch_size,
                device=self.given.device,
            )  # fmt: skip
        return self.tables[key]

    def facts(self) -> dict[str, Any]:
        given, cuda = self.given, self.given.device.startswith("cuda")
        return {
            "format": self.format,
            "samples": given.samples,
            "length": given.length if self.text else None,
            "calibration": Path(given.calibration).name,
            "evaluation": Path(given.evaluation).name,
            "count": self.exam.count,
            "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
            "torch": torch.__version__,
            **self.exam.facts(),
        }


def budget(scores: ScoreTable, bits: float) -> tuple[float, int, int]:
    """Stored bits, and the places of the two formats around them."""
    low, high = WIDTHS.index(math.floor(bits)), WIDTHS.index(math.ceil(bits))
    sizes = scores.costs[SIZE].sum(axis=0)
    return float(sizes[low] + (bits - math.floor(bits)) * (sizes[high] - sizes[low])), low, high


def even_mix(problem: Problem, low: int, high: int) -> list[int]:
    """The larger format wherever the share of it so far lags behind the share that the budget allows."""
    costs, most = problem.costs[SIZE], problem.budgets[SIZE]
    least, extra = costs[:, low].sum(), costs[:, high] - costs[:, low]
    share = (most - least) / extra.sum() if high > low else 0.0
    taken, due, choice = 0.0, 0.0, []
    for more in extra:
        due += share * more
        larger = high > low and taken + more / 2 <= due and least + taken + more <= most
        taken += more * larger
        choice.append(high if larger else low)
    return choice


def random_choice(problem: Problem, generator: random.Random) -> list[int]:
    """Any choice: units change at random until the budget is met and nothing larger fits."""
    units, options = problem.scores.shape
    costs, most = problem.costs[SIZE], problem.budgets[SIZE]
    choice = [generator.randrange(options) for _ in range(units)]

    def left() -> float:
        return most - sum(costs[unit, option] for unit, option in enumerate(choice))

    while left() < 0:
        unit = generator.randrange(units)
        choice[unit] = max(choice[unit] - 1, 0)
    for unit in generator.sample(range(units), units):
        while choice[unit] + 1 < options and costs[unit, choice[unit] + 1] - costs[unit, choice[unit]] <= left():
            choice[unit] += 1
    return choice


def jobs(given: argparse.Namespace, bench: Bench) -> Iterator[dict[str, Any]]:
    """What to run, the cheap first seed of everything before the second of anything."""
    for seed in range(max(given.seeds, given.draws)):
        for bits, method, allocator in itertools.product(given.bits, given.methods, (*BASELINES, *given.allocators)):
            if seed < (given.draws if allocator == "random" else given.seeds):
                yield {"model": bench.name, "bits": bits, "method": method, "allocator": allocator, "seed": seed}


def choose(bench: Bench, job: dict[str, Any]) -> Allocation:
    """The allocation of a job."""
    calibration = 0 if job["allocator"] == "random" else job["seed"]
    scores = bench.table(job["allocator"], calibration)
    most, low, high = budget(scores, job["bits"])
    problem = problem_of(scores, {SIZE: most})
    if job["allocator"] == "uniform":
        choice: Sequence[int] = even_mix(problem, low, high)
    elif job["allocator"] == "random":
        choice = random_choice(problem, random.Random(job["seed"]))
    else:
        return Allocation.of(scores, problem, solver_named(allocator_named(job["allocator"]).solver)(problem))
    made = Solution(tuple(choice), problem.score(choice), -math.inf, job["allocator"], "baseline")
    return Allocation.of(scores, problem, made)


def run(bench: Bench, job: dict[str, Any]) -> dict[str, Any]:
    """One allocation, one quantization, one evaluation."""
    given, started = bench.given, perf_counter()
    allocation = choose(bench, job)
    chosen = perf_counter() - started
    method = parse_method(job["method"], {"weights": bench.options[-1]})
    result = quantize(
        given.model, method, given.calibration, allocation=allocation, count=given.samples,
        seed=0 if job["allocator"] == "random" else job["seed"], length=given.length if bench.text else None,
        batch_size=given.batch_size, device=given.device,
    )  # fmt: skip
    cache_weights(result.network.model)
    found = bench.exam.mark(result.network)
    baseline = job["allocator"] in BASELINES
    return job | {
        "achieved_bits": allocation.bits,
        "as_promised": result.report.data["allocation"]["as_promised"],
        "measure_s": None if baseline else allocation.facts.get("time_s"),
        "choose_s": None if baseline else chosen,
        "gap": allocation.gap,
        **{key: value for key, value in found.to_json().items() if key in ("perplexity", "top1", "kl", "agreement")},
        "formats": {name: str(option).split(":")[0] for name, option in allocation.units.items()},
    }


@torch.no_grad()
def exhaustive(bench: Bench) -> dict[str, Any]:
    """KL of every choice of 2 or 4 bits for a few units, the rest in full precision, and of allocators' choices."""
    given = bench.given
    evaluation = begin(
        given.model, parse_method("rtn", {}), given.evaluation, 8 if bench.text else given.count, 0, given.batch_size,
        given.device, given.length if bench.text else None, None,
    )[0]  # fmt: skip
    scores = bench.table("error", 0)
    places = sorted({round(x) for x in np.linspace(0, len(scores.units) - 1, given.units)})
    pair = [WIDTHS.index(2), WIDTHS.index(4)]
    units = tuple(scores.units[place] for place in places)
    options = tuple(scores.options[place] for place in pair)
    probe = Probe(
        evaluation.network, evaluation.anatomy, evaluation.data.batches, units, options, np.ones((len(units), 2), bool)
    )
    stored = [
        [{name: stored_weight(probe.weight(name), option) for name in unit.layers} for option in options]
        for unit in units
    ]
    references = [class_rows(probe.network.run(batch)) for batch in probe.batches]

    def divergence(choice: Sequence[int]) -> float:
        weights = {name: w for row, option in enumerate(choice) for name, w in stored[row][option].items()}
        with replaced(probe, weights, {}):
            pairs = zip(references, probe.batches, strict=True)
            return float(torch.cat([kl_rows(ref, class_rows(probe.network.run(batch))) for ref, batch in pairs]).mean())

    true = {choice: divergence(choice) for choice in itertools.product((0, 1), repeat=len(units))}
    found = {"model": bench.name, "units": [unit.name for unit in units], "choices": len(true), "allocators": {}}
    for allocator in given.allocators:
        try:
            scores = bench.table(allocator, 0)
            costs, pairs = scores.costs[SIZE][places][:, pair], np.ix_(places, places)
            problem = Problem(
                scores.scores[places][:, pair], {SIZE: costs}, {SIZE: costs.mean() * len(places)},
                None if scores.priority is None else scores.priority[places],
                {to: scores.pairs[p][pairs] for to, p in enumerate(pair) if p in scores.pairs},
            )  # fmt: skip
            choice = solver_named(allocator_named(allocator).solver)(problem).choice
        except DitherError as error:
            print(f"{allocator}: {error}", flush=True)
            continue
        fitting = sorted(value for one, value in true.items() if problem.fits(one))
        filled = [value for one, value in true.items() if problem.fits(one) and full(problem, one)]
        found["allocators"][allocator] = {"kl": true[choice], "rank": fitting.index(true[choice]) + 1}
        found |= {"best": fitting[0], "fitting": len(fitting), "random": float(np.mean(filled))}
    return found


def full(problem: Problem, choice: Sequence[int]) -> bool:
    """Whether no unit could have more bits."""
    more = [
        tuple(1 if unit == raised else o for unit, o in enumerate(choice)) for raised, o in enumerate(choice) if not o
    ]
    return not any(problem.fits(one) for one in more)


def collect(given: argparse.Namespace) -> dict[str, Any]:
    """Runs of earlier calls and of this one, written after each."""
    path = given.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"facts": {}, "runs": [], "exhaustive": {}}
    if path.exists():
        found |= json.loads(path.read_text())
    bench = Bench(given)
    facts = bench.facts()
    known = found["facts"].setdefault(bench.name, facts)
    differ = sorted(key for key in facts if facts[key] != known.get(key) and key not in ("perplexity", "top1"))
    if differ:
        raise SystemExit(f"earlier runs of {bench.name} differ in {differ}; give another --out")
    done = {tuple(one[key] for key in ("model", "bits", "method", "allocator", "seed")) for one in found["runs"]}

    def keep() -> None:
        path.write_text(json.dumps(found, indent=1) + "\n")  # a killed call keeps these

    for job in jobs(given, bench):
        if tuple(job.values()) in done:
            continue
        try:
            one = run(bench, job)
        except (DitherError, torch.OutOfMemoryError) as error:
            print(json.dumps(job | {"error": str(error)}), flush=True)
            continue
        print(json.dumps({key: value for key, value in one.items() if key != "formats"}), flush=True)
        found["runs"].append(one)
        keep()
    if given.units and bench.name not in found["exhaustive"]:
        found["exhaustive"][bench.name] = exhaustive(bench)
        keep()
    return found


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Models of several results, which were measured apart."""
    found: dict[str, Any] = {"facts": {}, "runs": [], "exhaustive": {}}
    for one in (json.loads(path.read_text()) for path in paths):
        if twice := found["facts"].keys() & one["facts"].keys():
            raise SystemExit(f"{sorted(twice)} are in several of these results")
        found["facts"] |= one["facts"]
        found["runs"] += one["runs"]
        found["exhaustive"] |= one["exhaustive"]
    return found


def main() -> None:
    given = arguments()
    found = merge(given.merge) if given.merge else collect(given)
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(report(found))
    given.out.with_suffix(".svg").write_text(plot(found) + "\n")
    print(report(found))


if __name__ == "__main__":
    main()
