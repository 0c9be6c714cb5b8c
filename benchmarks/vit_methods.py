"""Every vision method on trained vision transformers, at several bits, over several calibration draws.

    python benchmarks/vit_methods.py --models MODEL_FOLDER... --calibration train.npz --data test.npz [--device cuda]

Calibration pictures are drawn from one file, accuracy is measured on the other; both may be folders or .npz files.
Writes docs/results/vit_methods.json (every run) and .md (mean ± standard deviation over the draws).

    python benchmarks/vit_methods.py --merge A.json B.json --out docs/results/vit_methods

puts runs that were made apart into one table; of two runs of the same model, method, setting and seed the later file's
counts. `--add` does the same with what OUT.json holds already, so that methods, settings or draws can be added to it:

    python benchmarks/vit_methods.py --add --methods ptq4vit --settings int6/int6 --first-seed 5 --seeds 5 …

Runs that OUT.json holds are skipped then. Runs of a call that was stopped are in OUT.unfinished.json; the next goes on.
"""

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from dither.data import open_images
from dither.evaluation import evaluate_classifier, predict
from dither.models.network import Network, open_network
from dither.nn.linear import cache_weights
from dither.pipeline import quantize
from dither.recipe import parse_method

METHODS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "repq": "repq",
    "repq + gptq": "repq-gptq",
    "repq + aqer": "erq-v1+rounding=nearest+refine_steps=0",
    "repq + refinement": "erq-v1+rounding=nearest+absorb=false",
    "repq + ridge": "erq-v1+absorb=false+refine_steps=0",
    "erq v1": "erq-v1",
    "erq v2": "erq-v2",
    "erq, fp inputs": "erq+inputs=fp",
    "erq, one grid": "erq+dual=false",
    "erq, no refinement": "erq+refine_steps=0",
    "erq, no aqer": "erq+absorb=false",
    "erq": "erq",
    "easyquant": "noisyquant-linear+noise=none",
    "noisyquant": "noisyquant-linear",
    "noisyquant, by the condition": "noisyquant-linear+noise=condition",
    "base ptq": "base-ptq",
    "ptq4vit": "ptq4vit",
    "ptq4vit, most likely labels": "ptq4vit+gradients=label",
    "ptq4vit, released gradient": "ptq4vit+gradients=divergence",
    "ptq4vit, no gradient": "ptq4vit+metric=squared",
    "noisyquant on ptq4vit": "noisyquant-ptq4vit",
    "repquant, clips alone": "repquant+iterations=0+start=nearest",
    "repquant, no reconstruction": "repquant+iterations=0",
    "repquant": "repquant",
}
MACHINE = ("device", "torch", "workers")  # may differ between results, and is named
SETTINGS = ("int6/int6", "int4/int4", "int3/int4", "int3/int3", "int2/int4")
RULES = {
    "all": "",
    "linear inputs": "+attention=none+probabilities=none",
    "linear layers": "+attention=none+probabilities=none+skip=['*embeddings*']",  # the patch embedding stays too
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--calibration")
    parser.add_argument("--data")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of earlier calls, instead of running")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="labels, or LABEL=METHOD")
    parser.add_argument("--rules", choices=RULES, default="all", help="what is quantized besides the linear layers")
    parser.add_argument("--seeds", type=int, default=5, help="calibration draws")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="keep the runs that OUT.json holds")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--count", type=int, default=None, help="evaluation pictures; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--at-once", type=int, help="runs that share the machine, over all calls; the table says so")
    parser.add_argument("--quick", action="store_true", help="one seed, 500 pictures, W3A4")
    parser.add_argument("--out", type=Path, default=Path("docs/results/vit_methods"))
    given = parser.parse_args()
    if not given.merge and not (given.models and given.calibration and given.data):
        parser.error("give --models, --calibration and --data, or --merge")
    if given.quick:
        given.seeds, given.count, given.settings = 1, 500, ("int3/int4",)
    return given


class Bench:
    """One model in one process: pictures decoded once, reference logits computed once."""

    def __init__(self, model: str, given: argparse.Namespace) -> None:
        self.given, self.network = given, open_network(model, given.device)
        pictures = open_images(given.data)
        pictures = pictures if given.count is None else pictures.sample(given.count, seed=0)
        self.pixels = torch.cat(list(pictures.pixel_batches(self.network.processor, 500)))
        self.labels, self.calibration = pictures.labels, open_images(given.calibration)
        self.reference = predict(self.network.model, self.pixels.split(250), given.device)

    def run(self, label: str, setting: str, seed: int) -> dict[str, Any]:
        weights, activations = setting.split("/")
        text = dict(_labelled(self.given.methods))[label] + RULES[self.given.rules]
        method = parse_method(text, {"weights": weights, "activations": activations})
        start = time.perf_counter()
        result = quantize(self.network.model, method, self.calibration, count=self.given.samples, seed=seed)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        found = self.evaluate(result.network) | {"forward_s": time.perf_counter() - start}
        totals, layers = result.report.data["totals"], result.report.data["layers"]
        errors = [row["output_error"] for row in layers if row["output_error"] is not None]
        return {
            "model": self.network.name,
            "method": label,
            "setting": setting,
            "seed": seed,
            "bits_per_weight": totals["bits_per_weight"],
            "size_bytes": totals["size_bytes"],
            "time_s": seconds,
            "mean_output_error": statistics.fmean(errors),
            **found,
        }

    def evaluate(self, network: Network) -> dict[str, Any]:
        cache_weights(network.model)
        found = evaluate_classifier(
            network.model,
            self.pixels.split(250),
            reference=self.reference,
            class_ids=None if self.labels is None else [int(label) for label in self.labels],
            device=self.given.device,
        )
        return found.to_json()


def _labelled(texts: list[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        label, equals, method = text.partition("=")
        yield (label, method) if equals else (text, METHODS[text])


_bench: dict[str, Bench] = {}


def _job(job: tuple[argparse.Namespace, str, str, str, int]) -> dict[str, Any]:
    given, model, label, setting, seed = job
    if given.device != "cpu" or given.workers > 1:
        torch.set_num_threads(1)
    if model not in _bench:
        _bench[model] = Bench(model, given)
    return _bench[model].run(label, setting, seed)


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["model"], run["method"], run["setting"], run["seed"]


def collect(given: argparse.Namespace, facts: dict[str, Any], done: set[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Runs that are not done, the first draw of all before the second of any; kept as they end."""
    jobs = [
        (given, model, label, setting, seed)
        for seed in range(given.first_seed, given.first_seed + given.seeds)
        for model in given.models
        for setting in given.settings
        for label, _ in _labelled(given.methods)
        if (Path(model).resolve().name, label, setting, seed) not in done
    ]
    runs: list[dict[str, Any]] = []
    unfinished = given.out.with_suffix(".unfinished.json")
    before = json.loads(unfinished.read_text())["runs"] if unfinished.is_file() else []
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        for run in pool.imap_unordered(_job, jobs):
            runs.append(run)
            unfinished.write_text(json.dumps({"runs": before + runs, "facts": facts}) + "\n")
            print(
                f"{len(runs)}/{len(jobs)} {run['model']} {run['setting']} {run['method']} {run['top1']:.4f} "
                f"{run['time_s']:.1f} s + {run['forward_s']:.1f} s",
                flush=True,
            )
    return runs


def in_order(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model (as they come), setting, method (as in METHODS, others behind) and draw."""
    models = list(dict.fromkeys(run["model"] for run in runs))
    known = {label: place for place, label in enumerate(METHODS)}
    others = {run["method"]: len(known) for run in runs if run["method"] not in known}
    place = known | others
    return sorted(
        runs, key=lambda r: (models.index(r["model"]), r["setting"], place[r["method"]], r["method"], r["seed"])
    )


def table(runs: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown: a table a model, methods down, settings across, top-1 in percent as mean ± standard deviation."""
    lines = ["# Vision methods on trained vision transformers", "", *_describe(facts)]
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    for model in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == model]
        lines += ["", f"## {model}: full precision {100 * mine[0]['fp_top1']:.2f} %", ""]
        head = ["method", *map(_short, settings), "draws", f"bits at {_short(settings[-1])}", "seconds"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for method in dict.fromkeys(run["method"] for run in mine):
            rows = [run for run in mine if run["method"] == method]
            cells = [_spread([100 * run["top1"] for run in rows if run["setting"] == setting]) for setting in settings]
            last = [run["bits_per_weight"] for run in rows if run["setting"] == settings[-1]]
            bits = f"{statistics.fmean(last):.2f}" if last else ""
            seconds = statistics.median(run["time_s"] for run in rows)
            lines.append(f"| {method} | " + " | ".join(cells) + f" | {_draws(rows)} | {bits} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def _draws(rows: list[dict[str, Any]]) -> str:
    """How many draws the settings have, or from how many to how many."""
    counts = sorted(Counter(run["setting"] for run in rows).values())
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def _short(setting: str) -> str:
    weights, activations = setting.split("/")
    return f"W{weights.removeprefix('int')}A{activations.removeprefix('int')}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def _describe(facts: dict[str, Any]) -> list[str]:
    return [
        f"Top-1 in percent on {facts['count']} pictures, {facts['samples']} calibration pictures, mean ± standard "
        f"deviation over the draws. Quantized: {facts['rules']}. Written by "
        f"`benchmarks/vit_methods.py` on {facts['device']}, torch {facts['torch']}; seconds are per quantization "
        f"(median), {facts['workers']} at a time.",
    ]


def merge(found: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs of several results; what decides about accuracy must agree, machines may differ."""
    same = [{key: one["facts"][key] for key in ("count", "samples", "rules")} for one in found]
    if any(one != same[0] for one in same):
        raise SystemExit(f"these results were made under different settings: {same}")
    methods = {label: text for one in found for label, text in one["facts"]["methods"].items()}
    for one in found:
        if changed := {label for label, text in one["facts"]["methods"].items() if methods[label] != text}:
            raise SystemExit(f"these labels mean different methods: {sorted(changed)}")
    said = {key: [part for one in found for part in str(one["facts"][key]).split(", ")] for key in MACHINE}
    machines = {key: ", ".join(dict.fromkeys(parts)) for key, parts in said.items()}
    runs = {key_of(run): run for one in found for run in one["runs"]}
    return in_order(list(runs.values())), {**same[0], **machines, "methods": methods}


def facts_of(given: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.processor() or "a CPU"
    return {
        "count": len(open_images(given.data)) if given.count is None else given.count,
        "samples": given.samples,
        "rules": given.rules,
        "device": name,
        "torch": torch.__version__,
        "workers": given.at_once or given.workers,
        "methods": dict(_labelled(given.methods)),
    }


def measure(given: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs of this call, of one that was stopped, and with --add those of the result."""
    given.out.parent.mkdir(parents=True, exist_ok=True)
    stored, unfinished = (given.out.with_suffix(end) for end in (".json", ".unfinished.json"))
    before = [path for path in ([stored] if given.add else []) + [unfinished] if path.is_file()]
    facts = facts_of(given)
    found = [json.loads(path.read_text()) for path in before] + [{"runs": [], "facts": facts}]
    done = {key_of(run) for run in merge(found)[0]}
    found[-1]["runs"] = collect(given, facts, done)
    return merge(found)


def main() -> None:
    given = arguments()
    if given.merge:
        runs, facts = merge([json.loads(path.read_text()) for path in given.merge])
    else:
        runs, facts = measure(given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "runs": runs}) + "\n")
    given.out.with_suffix(".md").write_text(table(runs, facts))
    given.out.with_suffix(".unfinished.json").unlink(missing_ok=True)
    print(table(runs, facts))


if __name__ == "__main__":
    main()
