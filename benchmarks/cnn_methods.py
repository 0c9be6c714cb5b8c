"""ConvNets: methods with and without data, bits by ZeroQ's front, pruning with and without absorption.

    python benchmarks/cnn_methods.py --models RESNET MOBILENET --calibration train.npz --data test.npz [--device cuda]

Four tables: every method at several bits (methods that draw calibration pictures over several draws, those without data
over as many seeds of their noise); folded batch normalizations against those left alone; ZeroQ's front against the
same bits everywhere at equal size; pruning. A folder of a timm model works too (EfficientNet-Lite0), with pictures of
its own: call the script once for each set of pictures, with one --out. Runs that are there are skipped. `--workers`
runs several at a time with a thread each; `--merge` puts results that were made apart into one table.

Writes docs/results/cnn_methods.json (every run) and .md (mean ± standard deviation over the draws).
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cnn_report import table
from torch import multiprocessing

import dither
from dither.data import open_images
from dither.distilled import calibration_without_data
from dither.evaluation import evaluate_classifier, predict
from dither.models.distil import Distillation
from dither.models.network import open_network
from dither.nn.linear import cache_weights
from dither.recipe import parse_method

SETTINGS = ("int8/int8", "int6/int6", "int4/int8", "int4/int4")
CALIBRATED = {"rtn": "rtn", "gptq": "gptq", "erq, halves": "erq-v2", "erq": "erq"}
WITHOUT_DATA = {"zeroq": "zeroq", "zeroq, batch statistics": "zeroq+distillation={statistics: batch, start: unit}"}
DISTILLED = {"rtn, distilled": "rtn", "gptq, distilled": "gptq", "erq, distilled": "erq"}
PRUNING = {
    "cut + rtn": "udfc+absorb=false",
    "udfc": "udfc",
    "udfc, bias corrected": "udfc+bias_correct=true",
    "udfc-corrected": "udfc-corrected",
}
PARTS = ("methods", "folding", "front", "pruning")
SHARES = (0.0, 0.1, 0.2, 0.3)
BITS = (3, 4, 5, 6)  # of the uniform models whose sizes the front has to beat


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--calibration")
    parser.add_argument("--data")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of earlier calls, instead of running")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--front-bits", nargs="+", type=int, default=BITS, help="whose sizes the front is held against")
    parser.add_argument("--methods", nargs="+", help="labels; all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="for draws that are run apart and merged")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500, help="of distillation")
    parser.add_argument("--count", type=int, default=None, help="evaluation pictures; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, with one thread each")
    parser.add_argument("--timm", help="folder that timm and torchvision are installed in, for models of timm")
    parser.add_argument("--quick", action="store_true", help="one seed, 200 pictures, W4A8, 8 pictures of 40 steps")
    parser.add_argument("--out", type=Path, default=Path("docs/results/cnn_methods"))
    given = parser.parse_args()
    if not given.merge and not (given.models and given.calibration and given.data):
        parser.error("give --models, --calibration and --data, or --merge")
    if given.quick:
        given.seeds, given.count, given.samples, given.steps, given.settings = 1, 200, 8, 40, ("int4/int8",)
    return given


Job = dict[str, Any]


def jobs(given: argparse.Namespace) -> Iterator[Job]:
    """Everything to run for one model, the cheapest first; a job is the key of its run."""
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        if "pruning" in given.parts and seed == 0:  # nothing is drawn
            for share in SHARES:
                for label, text in PRUNING.items():
                    yield {"part": "pruning", "method": label, "text": text, "setting": f"{share:.0%}", "seed": 0}
        if "methods" in given.parts:
            every = [(CALIBRATED, "data"), (WITHOUT_DATA, "none"), (DISTILLED, "distilled")]
            for setting in given.settings:
                for methods, source in every:
                    for label, text in methods.items():
                        yield {
                            "part": "methods", "method": label, "text": text, "setting": setting, "seed": seed,
                            "data": source,
                        }  # fmt: skip
        if "folding" in given.parts:
            for setting in given.settings:
                for label in ("rtn", "gptq", "erq"):
                    yield {
                        "part": "folding", "method": f"{label}, not folded", "text": f"{label}+fold_norms=false",
                        "setting": setting, "seed": seed, "data": "data",
                    }  # fmt: skip
        if "front" in given.parts:
            for bits in given.front_bits:
                for label in ("the same bits everywhere", "zeroq"):
                    yield {
                        "part": "front", "method": label, "text": "zeroq", "setting": f"int{bits}/int8", "seed": seed,
                        "data": "none",
                    }  # fmt: skip


class Bench:
    """One model: pictures decoded once, reference logits computed once."""

    def __init__(self, folder: str, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.network = open_network(folder, given.device)
        pictures = open_images(given.data)
        pictures = pictures if given.count is None else pictures.sample(given.count, seed=0)
        self.pixels = torch.cat(list(pictures.pixel_batches(self.network.processor, 250)))
        self.labels, self.calibration = pictures.labels, open_images(given.calibration)
        self.reference = predict(self.network.model, self.pixels.split(250), given.device)
        self.pictures: dict[int, list[Any]] = {}
        self.sizes: dict[str, int] = {}  # of uniform models, which the front is held against

    def run(self, job: Job) -> dict[str, Any]:
        method, data = self.method(job), None
        if job.get("data") in ("data", "distilled"):
            data = self.calibration if job["data"] == "data" else self.distilled(job["seed"])
        start = time.perf_counter()
        result = dither.quantize(
            self.network.model, method, data, count=self.asked(job),
            seed=job["seed"],
        )  # fmt: skip
        seconds = time.perf_counter() - start
        report = result.report.data
        size = report["totals"]["size_bytes"]
        if job["part"] == "front" and job["method"] != "zeroq":
            self.sizes[f"{job['setting']} {job['seed']}"] = size
        found = self.evaluate(result.model)
        return {
            **job,
            "model": self.network.name,
            "size_bytes": size,
            "bits_per_weight": report["totals"]["bits_per_weight"],
            "time_s": seconds,
            "distillation_s": report.get("distilled", {}).get("time_s"),
            "loss": [row["loss"] for row in report.get("distilled", {}).get("loss", [])],
            "pareto": _front(report),
            "forward_s": found.pop("forward_s"),
            **found,
        }

    def asked(self, job: Job) -> int | None:
        """Pictures to draw or to distil; none where nothing is measured or they are made already."""
        made = job["part"] == "pruning" or job.get("data") == "distilled"
        return None if made else self.given.samples

    def distilled(self, seed: int) -> list[Any]:
        """Pictures of a seed, made once; the seconds of methods that calibrate on them do not count them."""
        if seed not in self.pictures:
            settings = Distillation(count=self.given.samples, steps=self.given.steps)
            data, _ = calibration_without_data(self.network, settings, None, seed, 32)
            self.pictures = {seed: list(data.batches)}
        return self.pictures[seed]

    def method(self, job: Job) -> Any:
        if job["part"] == "pruning":
            return parse_method(job["text"], {"prune": float(job["setting"].rstrip("%")) / 100})
        weights, activations = job["setting"].split("/")
        fields: dict[str, Any] = {"weights": weights, "activations": activations}
        text = job["text"]
        if text.startswith("zeroq"):
            distillation = {"steps": self.given.steps}
            if "distillation=" in text:
                distillation |= {"statistics": "batch", "start": "unit"}
            fields |= {"distillation": distillation, "weights": f"{weights}:channel:asym:percentile"}
            text = text.split("+")[0]
        if job["part"] == "front":
            fields["weights"] = f"{weights}:channel:asym:minmax"
            if job["method"] == "zeroq":
                fields |= {"size": self.sizes[f"{job['setting']} {job['seed']}"], "bits": [2, 3, 4, 5, 6, 8]}
        return parse_method(text, fields)

    def evaluate(self, model: torch.nn.Module) -> dict[str, Any]:
        cache_weights(model)
        start = time.perf_counter()
        found = evaluate_classifier(
            model,
            self.pixels.split(250),
            reference=self.reference,
            class_ids=None if self.labels is None else [int(label) for label in self.labels],
            device=self.given.device,
        ).to_json()
        return found | {"forward_s": time.perf_counter() - start}


def _front(report: dict[str, Any]) -> dict[str, Any] | None:
    pareto = report.get("pareto")
    return None if pareto is None else {key: pareto[key] for key in ("length", "chosen", "uniform", "time_s")}


KEY = ("part", "model", "method", "setting", "seed", "count", "samples", "steps")


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(name) for name in KEY)


Task = tuple[argparse.Namespace, str, tuple[Job, ...], dict[str, int]]  # jobs of one model that one worker has to do


def tasks(given: argparse.Namespace, runs: list[dict[str, Any]]) -> Iterator[Task]:
    """What is not among the runs; together what shares distilled pictures, or a size that the front has to meet."""
    count = len(open_images(given.data)) if given.count is None else given.count
    for folder in given.models:
        asked = {"model": Path(folder).resolve().name, "samples": given.samples, "steps": given.steps, "count": count}
        done = {key_of(run): run for run in runs}
        groups: dict[tuple[Any, ...], list[Job]] = {}
        sizes: dict[str, int] = {}
        for job in jobs(given):
            if given.methods and job["method"] not in given.methods:
                continue
            if run := done.get(key_of(job | asked)):
                if job["part"] == "front" and job["method"] != "zeroq":
                    sizes[f"{job['setting']} {job['seed']}"] = run["size_bytes"]
                continue
            shared: tuple[Any, ...] = (len(groups),)
            if job["part"] == "front":
                shared = ("front", job["setting"], job["seed"])
            elif job.get("data") == "distilled":
                shared = ("distilled", job["seed"])
            groups.setdefault(shared, []).append(job)
        for group in groups.values():
            yield given, folder, tuple(group), sizes


_benches: dict[str, Bench] = {}
_operators: list[torch.library.Library] = []  # live as long as timm is needed


def work(task: Task) -> list[dict[str, Any]]:
    """In a worker: the runs of a task; a model is opened once."""
    given, folder, group, sizes = task
    if given.device != "cpu" or given.workers > 1:
        torch.set_num_threads(1)
    if given.timm is not None and not _operators:
        _operators.append(find_timm(given.timm))
    if folder not in _benches:
        _benches[folder] = Bench(folder, given)
    bench = _benches[folder]
    bench.sizes |= sizes
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.processor() or "a CPU"
    made = {"samples": given.samples, "steps": given.steps, "count": len(bench.pixels)}
    made |= {"device": name, "threads": torch.get_num_threads()}
    return [bench.run(job) | made for job in group]


def collect(given: argparse.Namespace) -> dict[str, Any]:
    """Runs of earlier calls and of this one, written as they end."""
    path = given.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"facts": {}, "runs": []}
    todo = list(tasks(given, known["runs"]))
    left = sum(len(group) for _, _, group, _ in todo)
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        for found in pool.imap_unordered(work, todo):
            known["runs"] += found
            known["facts"] = {"torch": torch.__version__}
            path.write_text(json.dumps(known) + "\n")
            left -= len(found)
            for run in found:
                print(
                    f"{run['model']} {run['part']} {run['setting']} {run['method']} {run['seed']}: "
                    f"{100 * run['top1']:.2f} % agreement {100 * run['agreement']:.2f} % {run['time_s']:.1f} s, "
                    f"{left} left",
                    flush=True,
                )
    return in_order(known)


def merge(paths: list[Path]) -> dict[str, Any]:
    """Runs of several results, each once; the tables name the machines of all."""
    found = [json.loads(path.read_text()) for path in paths]
    runs = {key_of(run): run for one in found for run in one["runs"]}
    versions = ", ".join(dict.fromkeys(one["facts"]["torch"] for one in found if one["facts"]))
    return in_order({"facts": {"torch": versions}, "runs": list(runs.values())})


def in_order(known: dict[str, Any]) -> dict[str, Any]:
    """By model, part, setting and method; a mean over other pictures or other distillation would mean nothing."""
    made: dict[str, tuple[int, ...]] = {}
    for run in known["runs"]:
        one = run["count"], run["samples"], run["steps"]
        if made.setdefault(run["model"], one) != one:
            raise SystemExit(
                f"runs of {run['model']} differ in pictures, samples or steps: {made[run['model']]} and {one}"
            )
    names = [*CALIBRATED, *WITHOUT_DATA, *DISTILLED, *PRUNING]
    settings = [*SETTINGS, *(setting for setting in dict.fromkeys(r["setting"] for r in known["runs"]))]

    def place(run: dict[str, Any]) -> tuple[Any, ...]:
        method = names.index(run["method"]) if run["method"] in names else len(names)
        return (
            run["model"],
            PARTS.index(run["part"]),
            settings.index(run["setting"]),
            method,
            run["method"],
            run["seed"],
        )

    return {**known, "runs": sorted(known["runs"], key=place)}


def find_timm(folder: str) -> torch.library.Library:
    """Let timm be imported from a folder; torchvision looks for two operators that a build of torch may lack."""
    sys.path.append(folder)
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def main() -> None:
    given = arguments()
    known = merge(given.merge) if given.merge else collect(given)
    given.out.with_suffix(".json").write_text(json.dumps(known) + "\n")
    given.out.with_suffix(".md").write_text(table(known))
    print(table(known))


if __name__ == "__main__":
    main()
