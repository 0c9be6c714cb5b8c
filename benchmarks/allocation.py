"""Every allocator against one format everywhere, random allocations of equal size and, of few units, the true optimum.

    python benchmarks/allocation.py --model FOLDER --calibration DATA --evaluation DATA --bits 2.5 3 3.5 [--device cuda]

The budget at B bits is the size of B-bit codes everywhere, scales included; between two whole numbers it lies between
the sizes of both. `uniform` mixes these two formats evenly over the depth. Runs are added to
docs/results/allocation.json as they end, and those that are there are skipped, so that several models and interrupted
calls make one table; score tables are kept in --scores. .md and .svg show all of it. `kl+method=gptq` is `kl` with
scores of the weights that GPTQ gives. --merge joins results of several machines: --merge A.json B.json --out RESULT.
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

import torch
from allocation_bench import BASELINES, WIDTHS, Bench, scored_by
from allocation_exhaustive import exhaustive
from allocation_report import plot, report
from allocation_searches import SEARCHES, searched, searches

from dither.allocating import ALLOCATORS, CPTQUANT, allocator_named
from dither.allocation.allocation import Allocation
from dither.allocation.even import even
from dither.allocation.problem import Problem, Solution
from dither.allocation.solve import problem_of, solver_named
from dither.allocation.table import SIZE, ScoreTable
from dither.errors import DitherError
from dither.nn.linear import cache_weights
from dither.pipeline import quantize
from dither.recipe import parse_method

KEY = ("model", "bits", "method", "allocator", "seed")  # of a run
NAMED = ("device", "torch")  # may differ between results of a model, and are named
BLIND = ("baq", *CPTQUANT, *(f"{name}-clusters" for name in CPTQUANT))  # to what weights become
SOLVED = tuple(f"{name}+method=gptq" for name in ALLOCATORS if name not in BLIND)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of earlier calls, instead of running")
    parser.add_argument("--bits", nargs="+", type=float, default=[3.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    parser.add_argument(
        "--allocators", nargs="*", default=[*ALLOCATORS, *SOLVED, *SEARCHES],
        help="settings may follow: kl+symmetric=true; with +method=gptq scores are of GPTQ's weights, for GPTQ only, "
        "and with +judged=same of the samples that it was given",
    )  # fmt: skip
    parser.add_argument("--format", help="with {bits} in it (default: groups of 64 for text, channels for pictures)")
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws")
    parser.add_argument("--first-seed", type=int, default=0, help="for draws that are run apart and merged")
    parser.add_argument("--draws", type=int, default=10, help="random allocations")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--count", type=int, help="evaluation pictures or windows (default: all)")
    parser.add_argument("--by-class", default="*mlp*=quadratic", help="one class of mixdq and vidit, and its measure")
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


def budget(scores: ScoreTable, bits: float) -> float:
    """Stored bits: between those of the two formats around."""
    low, high = WIDTHS.index(math.floor(bits)), WIDTHS.index(math.ceil(bits))
    sizes = scores.costs[SIZE].sum(axis=0)
    return float(sizes[low] + (bits - math.floor(bits)) * (sizes[high] - sizes[low]))


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
    first = given.first_seed
    for seed in range(first, first + max(given.seeds, given.draws)):
        for bits, method, allocator in itertools.product(
            given.bits, given.methods, (*given.baselines, *given.allocators)
        ):
            if allocator not in BASELINES and scored_by(allocator)[1] not in ("rtn", method):
                continue
            if seed < first + (given.draws if allocator == "random" else given.seeds):
                yield {"model": bench.name, "bits": bits, "method": method, "allocator": allocator, "seed": seed}


def choose(bench: Bench, job: dict[str, Any]) -> Allocation:
    """The allocation of a job."""
    calibration = 0 if job["allocator"] == "random" else job["seed"]
    scores = bench.table("error" if searches(job["allocator"]) else job["allocator"], calibration)
    most = budget(scores, job["bits"])
    if searches(job["allocator"]):
        return searched(bench, job["allocator"], calibration, most)
    problem = problem_of(scores, {SIZE: most})
    if job["allocator"] == "uniform":
        choice: Sequence[int] = even(problem).choice
    elif job["allocator"] == "random":
        choice = random_choice(problem, random.Random(job["seed"]))
    else:
        return Allocation.of(
            scores, problem, solver_named(allocator_named(scored_by(job["allocator"])[0]).solver)(problem)
        )
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
    if differ := differing(facts, known):
        raise SystemExit(f"earlier runs of {bench.name} differ in {differ}; give another --out")
    found["facts"][bench.name] = known | named(known, facts)
    done = {tuple(one[key] for key in KEY) for one in found["runs"]}

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
    for method in given.methods if given.units else ():
        if (key := f"{bench.name}, {method}") not in found["exhaustive"]:
            found["exhaustive"][key] = exhaustive(bench, method)
            keep()
    return found


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Several results as one; of a run that is in several of them, the last. Facts of a model must agree."""
    found: dict[str, Any] = {"facts": {}, "runs": [], "exhaustive": {}}
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        one = json.loads(path.read_text())
        for model, facts in one["facts"].items():
            if differ := differing(facts, found["facts"].setdefault(model, facts)):
                raise SystemExit(f"{path}: runs of {model} differ in {differ} from those before")
            found["facts"][model] |= named(found["facts"][model], facts)
        runs |= {tuple(run[key] for key in KEY): run for run in one["runs"]}
        found["exhaustive"] |= one["exhaustive"]
    found["runs"] = list(runs.values())
    return found


def differing(facts: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """What two results of a model were not measured alike in."""
    keys = facts.keys() | known.keys()
    free = ("perplexity", "top1", *NAMED)
    return sorted(key for key in keys if facts.get(key) != known.get(key) and key not in free)


def named(*facts: dict[str, Any]) -> dict[str, str]:
    """The machines of several results."""
    return {key: "; ".join(dict.fromkeys(part for one in facts for part in one[key].split("; "))) for key in NAMED}


def main() -> None:
    given = arguments()
    found = merge(given.merge) if given.merge else collect(given)
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(report(found))
    if found["runs"]:
        given.out.with_suffix(".svg").write_text(plot(found) + "\n")
    print(report(found))


if __name__ == "__main__":
    main()
