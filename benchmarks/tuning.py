"""How many trials a search needs to find the best of 96 configurations: boosted trees, genetic, random and grid search.

    python benchmarks/tuning.py measure --models vit_tiny vit_small --pictures cifar10_train.npz --raw tables/ \\
        [--quick] [--device cuda --workers 8]
    python benchmarks/tuning.py search --raw tables/

`measure` quantizes every configuration once (methods × schemes × range searches × granularities × mixed ends, W4A4) and
judges it on training pictures that calibration does not use; it goes on where it was stopped, and `--seconds` stops it.
`search` plays every strategy on the whole tables, which costs nothing, 40 times with other seeds, with the lessons of
another table, whole or not, as transfer, and writes docs/results/tuning.json and .md. Grid search has no seed: its
repetitions shuffle dimensions and values.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dither.engine.local import InProcess, ProcessPool
from dither.quantune.bench import Bench
from dither.quantune.data import open_tuning_data
from dither.quantune.ledger import Ledger
from dither.quantune.problem import pose
from dither.quantune.run import run_each
from dither.tuning import make_strategy
from dither.tuning.journal import Journal, read_journal
from dither.tuning.objective import Objective
from dither.tuning.space import Dimension, Space
from dither.tuning.surrogate import Earlier
from dither.tuning.trial import Trial

DIMENSIONS = (
    Dimension("method", ("rtn", "gptq", "repq", "erq")),
    Dimension("weights", ("int4",)),
    Dimension("activations", ("int4",)),
    Dimension("scheme", ("asym", "sym", "pow2")),
    Dimension("search", ("minmax", "percentile")),
    Dimension("granularity", ("tensor", "channel")),
    Dimension("ends", ("quantized", "kept")),
    Dimension("samples", (32,)),
)
OBJECTIVES = ("accuracy", "kl")
NEAR = 3  # ranks that count as nearly the best
CHECKPOINTS = (5, 10, 20, 40)  # trials after which the regret is told
LABELS = {"xgboost": "boosted trees", "transfer": "boosted trees, transfer", "genetic": "genetic", "random": "random",
          "grid": "grid"}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "search"))
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--pictures", type=Path, help="labelled training pictures; calibration and judging share none")
    parser.add_argument("--raw", type=Path, required=True, help="folder of the tables, one .jsonl a model")
    parser.add_argument("--count", type=int, default=2000, help="pictures that judge")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before the trial behind so many")
    parser.add_argument("--workers", type=int, default=1, help="trials at once, each in a process of its own")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="500 pictures")
    parser.add_argument("--out", type=Path, default=Path("docs/results/tuning"))
    given = parser.parse_args()
    if given.what == "measure" and not (given.models and given.pictures):
        parser.error("measure needs --models and --pictures")
    if given.quick:
        given.count = 500
    return given


def measure(given: argparse.Namespace, model: Path) -> None:
    """Every configuration of a model that its table does not hold yet."""
    started = time.monotonic()
    given.raw.mkdir(parents=True, exist_ok=True)
    sets = open_tuning_data(given.pictures, None, None, [32], 0, given.raw)
    bench = Bench(model, sets.calibration, sets.data, given.count, None, 100, given.device)
    problem = pose(bench, sets, "accuracy", (), [32], lambda _: DIMENSIONS, 0)
    space, journal = problem.space, Journal(given.raw / f"{model.name}.jsonl", problem.header({}), resume=True)
    ledger = Ledger(problem, journal, 0, len(space))
    left = [(number, point) for number, point in enumerate(space.points) if number not in journal.records]
    with ProcessPool(given.workers) if given.workers > 1 else nullcontext(InProcess()) as pool:
        for round_ in batched(left, given.workers):
            if time.monotonic() - started > given.seconds:
                print(f"{model.name}: {len(journal.records)} of {len(space)}, stopped")
                return
            points = dict(round_)
            for outcome in run_each(pool, bench, [ledger.task(*one) for one in round_]):
                point = points[outcome.number]
                ledger.judge(outcome, point)
                found = outcome.error or outcome.figures["top1"]
                print(outcome.number, *point, found, f"{outcome.time_s:.1f} s", flush=True)
    print(f"{model.name}: all {len(space)} are measured")


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of `size`, the last one perhaps shorter."""
    yield from (items[start : start + size] for start in range(0, len(items), size))


class Table:
    """The measured configurations of a model."""

    def __init__(self, path: Path) -> None:
        self.header, self.rows = read_journal(path)
        self.name, self.features = self.header["model"]["name"], self.header["features"]
        self.space = Space(DIMENSIONS, tuple(_point(row["configuration"]) for row in self.rows))
        self.whole = len(self.rows) == math.prod(len(one.values) for one in DIMENSIONS)

    def costs(self, objective: str) -> dict[tuple[Any, ...], float]:
        """The cost of each point; a failed one costs more than all others."""
        aim = Objective(objective)
        found = [None if r["error"] else aim.cost(r["figures"], self.header["reference"]) for r in self.rows]
        worst = max(cost for cost in found if cost is not None)
        costs = [worst if cost is None else cost for cost in found]
        return dict(zip(self.space.points, costs, strict=True))

    def lessons(self, objective: str) -> list[Earlier]:
        """All rows as earlier trials of another model's search."""
        costs = self.costs(objective)
        return [Earlier(self.space.configuration(point), costs[point], self.features) for point in self.space.points]


def _point(configuration: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(configuration[one.name] for one in DIMENSIONS)


def shuffled(space: Space, seed: int) -> Space:
    """The same points in the order of a nested loop over shuffled dimensions and values."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(space.dimensions))
    ranks = [
        {v: int(r) for v, r in zip(d.values, draw.permutation(len(d.values)), strict=True)} for d in space.dimensions
    ]
    return Space(space.dimensions, tuple(sorted(space.points, key=lambda p: [ranks[k][p[k]] for k in order])))


def play(table: Table, objective: str, strategy: str, seed: int, other: Table | None) -> list[float]:
    """The costs in the order in which a strategy tries the points."""
    costs = table.costs(objective)
    if strategy == "grid":
        return [costs[point] for point in shuffled(table.space, seed).points]
    lessons = other.lessons(objective) if other is not None else []
    name = "xgboost" if strategy == "transfer" else strategy
    searcher = make_strategy(name, table.space, seed, table.features, lessons)
    tried: list[float] = []
    while len(tried) < len(costs):
        point = searcher.ask()[0]
        searcher.tell(Trial(len(tried), point, costs[point]))
        tried.append(costs[point])
        if tried[-1] == min(costs.values()):
            break
    return tried


def figures(tried: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """Trials to the best, trials to one of the nearly best, and the regret (cost over the best) on the way."""
    ranked = sorted(costs)
    near = ranked[NEAR - 1]
    found: dict[str, float] = {
        "trials_to_best": 1 + next(k for k, cost in enumerate(tried) if cost == ranked[0]),
        "trials_to_near": 1 + next(k for k, cost in enumerate(tried) if cost <= near),
    }
    return found | {f"regret_{n}": min(tried[:n]) - ranked[0] for n in CHECKPOINTS}


def search(given: argparse.Namespace) -> None:
    """Play all strategies on all tables, and write the results."""
    tables = {path.stem: Table(path) for path in sorted(given.raw.glob("*.jsonl"))}
    results = []
    for name, table in tables.items():
        if not table.whole:
            continue  # its best is not known, but it has lessons for others
        others = [one for key, one in tables.items() if key != name]
        for objective in OBJECTIVES:
            costs = list(table.costs(objective).values())
            for strategy in LABELS:
                if strategy == "transfer" and not others:
                    continue
                runs = [
                    figures(
                        play(table, objective, strategy, seed, others[0] if strategy == "transfer" else None), costs
                    )
                    for seed in range(given.repetitions)
                ]
                row = {"model": name, "objective": objective, "strategy": strategy, "repetitions": len(runs)}
                for key in runs[0]:
                    values = [one[key] for one in runs]
                    row[key] = {"mean": statistics.fmean(values), "std": statistics.stdev(values), "max": max(values)}
                results.append(row)
                print(name, objective, strategy, row["trials_to_best"], flush=True)
    data = {
        "dimensions": {one.name: list(one.values) for one in DIMENSIONS},
        "tables": {name: {**one.header, "rows": one.rows} for name, one in tables.items()},
        "searches": results,
    }
    given.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(markdown(data))


def markdown(data: Mapping[str, Any]) -> str:
    """The results as tables."""
    lines = [
        "# Trials to the best of 96 configurations",
        "",
        "Written by `benchmarks/tuning.py`; every configuration was measured once, searches play on the table.",
    ]
    for name, table in data["tables"].items():
        known = sorted(
            (row for row in table["rows"] if not row["error"]), key=lambda row: float(row["figures"]["top1"])
        )
        shares = [f"{100 * value:.1f} %" for value in (known[0]["figures"]["top1"], known[-1]["figures"]["top1"])]
        failed, judged = len(table["rows"]) - len(known), table["fingerprint"]["evaluation"][0]
        full, best = f"{100 * table['reference']['top1']:.1f} %", _words(known[-1])
        alone = "" if any(row["model"] == name for row in data["searches"]) else " It only gives lessons."
        lines += ["", f"`{name}`: {len(known)} measured, {failed} failed, on {judged} training pictures.{alone}"]
        lines += [f"Top-1 {shares[0]} to {shares[1]} ({best}); full precision {full}."]
    for name in dict.fromkeys(row["model"] for row in data["searches"]):
        for objective in OBJECTIVES:
            rows = [row for row in data["searches"] if (row["model"], row["objective"]) == (name, objective)]
            unit, factor = ("points", 100) if objective == "accuracy" else ("nats", 1)
            lines += [
                "",
                f"## {name}, {objective}",
                "",
                f"Mean ± standard deviation over {rows[0]['repetitions']} searches; regret in {unit}.",
                "",
                f"| strategy | trials to the best | (worst) | trials to one of the best {NEAR} | "
                + " | ".join(f"regret after {n}" for n in CHECKPOINTS)
                + " |",
                "|---" * (4 + len(CHECKPOINTS)) + "|",
            ]
            for row in rows:
                best, near = row["trials_to_best"], row["trials_to_near"]
                cells = [
                    LABELS[row["strategy"]],
                    f"{best['mean']:.1f} ± {best['std']:.1f}",
                    f"{best['max']:.0f}",
                    f"{near['mean']:.1f} ± {near['std']:.1f}",
                ]
                cells += [f"{factor * row[f'regret_{n}']['mean']:.3f}" for n in CHECKPOINTS]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _words(row: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value) for name, value in row["configuration"].items() if name not in ("weights", "activations", "samples")
    )


def main() -> None:
    given = arguments()
    if given.what == "measure":
        for model in given.models:
            measure(given, model)
    else:
        search(given)


if __name__ == "__main__":
    main()
