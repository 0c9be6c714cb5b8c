"""ConvNets: methods with and without data, bits by ZeroQ's front, pruning with and without absorption.

    python benchmarks/cnn_methods.py --models RESNET MOBILENET --calibration train.npz --data test.npz [--device cuda]

Four tables: every method at several bits (methods that draw calibration pictures over several draws, those without data
over as many seeds of their noise); folded batch normalizations against those left alone; ZeroQ's front against the
same bits everywhere at equal size; pruning. A folder of a timm model works too (EfficientNet-Lite0), with pictures of
its own: call the script once for each set of pictures, with one --out. Runs that are there are skipped.

Writes docs/results/cnn_methods.json (every run) and .md (mean ± standard deviation over the draws).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

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
SHARES = (0.0, 0.1, 0.2, 0.3)
BITS = (3, 4, 5, 6)  # of the uniform models whose sizes the front has to beat


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--calibration")
    parser.add_argument("--data")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of earlier calls, instead of running")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--parts", nargs="+", default=["methods", "folding", "front", "pruning"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500, help="of distillation")
    parser.add_argument("--count", type=int, default=None, help="evaluation pictures; all by default")
    parser.add_argument("--device", default="cpu")
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
    for seed in range(given.seeds):
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
            for bits in BITS:
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


def collect(given: argparse.Namespace) -> dict[str, Any]:
    """Runs of earlier calls and of this one, written after each."""
    path = given.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {"facts": {}, "runs": []}
    done = {key_of(run) for run in known["runs"]}
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.processor() or "a CPU"
    for folder in given.models:
        bench = Bench(folder, given)
        asked = {"model": bench.network.name, "samples": given.samples, "steps": given.steps}
        for job in jobs(given):
            key = key_of({**job, **asked, "count": len(bench.pixels)})
            if key in done and job["part"] != "front":
                continue
            if key in done:
                bench.sizes |= {
                    f"{run['setting']} {run['seed']}": run["size_bytes"]
                    for run in known["runs"]
                    if key_of(run) == key and run["method"] != "zeroq"
                }
                continue
            found = {**bench.run(job), **asked, "count": len(bench.pixels), "device": name}
            known["runs"].append(found)
            known["facts"] = {"torch": torch.__version__}
            path.write_text(json.dumps(known) + "\n")
            print(
                f"{found['model']} {job['part']} {job['setting']} {job['method']} {job['seed']}: "
                f"{100 * found['top1']:.2f} % agreement {100 * found['agreement']:.2f} % {found['time_s']:.1f} s",
                flush=True,
            )
    return dict(known)


def merge(paths: list[Path]) -> dict[str, Any]:
    """Runs of several results, each once; the tables name the machines of all."""
    found = [json.loads(path.read_text()) for path in paths]
    runs = {key_of(run): run for one in found for run in one["runs"]}
    order = {name: place for place, name in enumerate((*CALIBRATED, *WITHOUT_DATA, *DISTILLED, *PRUNING))}
    ordered = sorted(runs.values(), key=lambda r: (r["model"], r["part"], order.get(r["method"], 0), r["seed"]))
    return {"facts": found[0]["facts"], "runs": ordered}


def table(known: dict[str, Any]) -> str:
    """Markdown: for each model what each part found."""
    lines = ["# Methods on ConvNets", "", *_describe(known)]
    for model in dict.fromkeys(run["model"] for run in known["runs"]):
        mine = [run for run in known["runs"] if run["model"] == model]
        lines += ["", f"## {model}: {len({run['seed'] for run in mine})} draws, full precision {_fp(mine)}"]
        lines += _grid("Top-1 in percent", [run for run in mine if run["part"] in ("methods", "folding")])
        lines += _front_table([run for run in mine if run["part"] == "front"])
        lines += _grid(
            "Pruned and rounded to 6 bits, no data: top-1 in percent by share of channels removed",
            [run for run in mine if run["part"] == "pruning"],
        )
        lines += _pruned([run for run in mine if run["part"] == "pruning"])
    return "\n".join(lines) + "\n"


def _fp(runs: list[dict[str, Any]]) -> str:
    return f"{100 * runs[0]['fp_top1']:.2f} % of {runs[0]['count']} pictures"


def _grid(title: str, runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    lines = ["", f"### {title}", "", "| method | " + " | ".join(map(_short, settings)) + " | seconds |"]
    lines += ["|---" * (len(settings) + 2) + "|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        rows = [run for run in runs if run["method"] == method]
        cells = [_spread([100 * run["top1"] for run in rows if run["setting"] == setting]) for setting in settings]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {_mean(rows, 'time_s'):.1f} |")
    return lines


def _front_table(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    lines = ["", "### ZeroQ's front against the same bits everywhere, activations in 8 bits, no data", ""]
    head = [
        "uniform bits",
        "size, MB",
        "uniform",
        "ZeroQ at this size",
        "its size, MB",
        "seconds",
        "of these distilling",
    ]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for setting in dict.fromkeys(run["setting"] for run in runs):
        rows = [run for run in runs if run["setting"] == setting]
        same = [run for run in rows if run["method"] != "zeroq"]
        own = [run for run in rows if run["method"] == "zeroq"]
        if not same or not own:
            continue
        lines.append(
            f"| {setting.split('/')[0].removeprefix('int')} | {_mean(same, 'size_bytes') / 1e6:.3f} | "
            f"{_spread([100 * run['top1'] for run in same])} | {_spread([100 * run['top1'] for run in own])} | "
            f"{_mean(own, 'size_bytes') / 1e6:.3f} | {_mean(own, 'time_s'):.1f} | {_mean(own, 'distillation_s'):.1f} |"
        )
    return lines


def _pruned(runs: list[dict[str, Any]]) -> list[str]:
    rows = [run for run in runs if run["method"] == "udfc-corrected"]
    if not rows:
        return []
    lines = ["", "| channels removed | size, MB | seconds to evaluate |", "|---|---|---|"]
    return lines + [f"| {r['setting']} | {r['size_bytes'] / 1e6:.3f} | {r['forward_s']:.2f} |" for r in rows]


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    values = [run[key] for run in runs if run[key] is not None]
    return statistics.fmean(values) if values else float("nan")


def _short(setting: str) -> str:
    weights, slash, activations = setting.partition("/")
    return f"W{weights.removeprefix('int')}A{activations.removeprefix('int')}" if slash else setting


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def _describe(known: dict[str, Any]) -> list[str]:
    runs = known["runs"]
    return [
        f"Mean ± standard deviation over draws of {_of(runs, 'samples')} pictures: from data for rtn, gptq and erq; "
        f"distilled in {_of(runs, 'steps')} steps from the model alone for zeroq and where the row says so. Batch "
        "normalizations are folded unless the row says otherwise; the input of the first layer stays in full "
        f"precision. Written by `benchmarks/cnn_methods.py` on {_of(runs, 'device')}, "
        f"torch {known['facts'].get('torch')}; seconds are of the whole quantization."
    ]


def _of(runs: list[dict[str, Any]], key: str) -> str:
    return " or ".join(str(value) for value in dict.fromkeys(run[key] for run in runs))


def find_timm(folder: str) -> torch.library.Library:
    """Let timm be imported from a folder; torchvision looks for two operators that a build of torch may lack."""
    sys.path.append(folder)
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def main() -> None:
    given = arguments()
    operators = None if given.timm is None else find_timm(given.timm)  # lives as long as they are needed
    known = merge(given.merge) if given.merge else collect(given)
    given.out.with_suffix(".json").write_text(json.dumps(known) + "\n")
    given.out.with_suffix(".md").write_text(table(known))
    print(table(known))
    del operators


if __name__ == "__main__":
    main()
