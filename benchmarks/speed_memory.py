"""Time of every method as a ratio to GPTQ, peak memory against the model's size, and time a layer against its size.

    python benchmarks/speed_memory.py --model MODEL_FOLDER --calibration PICTURES [--rounds 3]

Each quantization runs in a fresh process, the methods in turn within a round, so that a busy machine hits all alike.
Writes docs/results/speed_memory.json, .md and .svg.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("gptq", "rtn", "repq", "repq-gptq", "erq-v1", "erq-v2", "erq")
CHILD = """
import json, sys, torch, dither
from dither.data import open_images
from dither.run import peak_rss
model, calibration, method, device = sys.argv[1:]
import transformers.models.vit.modeling_vit
before = peak_rss()
method = dither.recipe.parse_method(method, {"weights": "int3", "activations": "int4"})
result = dither.quantize(model, method, calibration, device=device)
totals, layers = result.report.data["totals"], result.report.data["layers"]
print(json.dumps({"before": before, "peak": peak_rss(), "memory": 4 * totals["parameters"],
    "time_s": totals["time_s"], "layers": [[row["shape"], row["time_s"]] for row in layers]}))
"""


def measure(model: str, calibration: str, method: str, device: str) -> dict[str, Any]:
    code = "import dither.recipe\n" + CHILD
    command = [sys.executable, "-c", code, model, calibration, method, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def collect(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in given.methods}
    for turn in range(given.rounds):
        for method in given.methods:
            runs[method].append(measure(given.model, given.calibration, method, given.device))
            print(f"round {turn + 1} {method} {runs[method][-1]['time_s']:.1f} s", flush=True)
    return runs


def table(runs: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> str:
    size = next(iter(runs.values()))[0]["memory"]
    lines = [
        "# Time and memory of quantization",
        "",
        f"`{Path(given.model).name}` ({size / 2**20:.0f} MiB in float32) on {given.device}, W3A4, {given.rounds} "
        "rounds; ratios are within a round, given as median [least, greatest]. Peak is resident memory of the whole "
        "process; the last column takes off the model's own size. Written by `benchmarks/speed_memory.py`.",
        "",
        "| method | seconds | time / GPTQ | peak MiB | of which libraries MiB | peak − model MiB |",
        "|---|---|---|---|---|---|",
    ]
    for method, rows in runs.items():
        ratios = [row["time_s"] / base["time_s"] for row, base in zip(rows, runs["gptq"], strict=True)]
        peak = max(row["peak"] for row in rows)
        lines.append(
            f"| {method} | {statistics.median(row['time_s'] for row in rows):.1f} | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] | {peak / 2**20:.0f} | {rows[0]['before'] / 2**20:.0f} "
            f"| {(peak - size) / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method, rows in runs.items():
        points: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            for shape, seconds in row["layers"]:
                points.setdefault((shape[0], shape[1]), []).append(seconds)
        ordered = sorted(points.items(), key=lambda item: item[0][0] * item[0][1])
        axes.plot([o * i for (o, i), _ in ordered], [statistics.median(s) for _, s in ordered], "o-", label=method)
    axes.set(xscale="log", yscale="log", xlabel="weights in the layer", ylabel="seconds to solve it (median)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the first should be gptq")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed_memory"))
    given = parser.parse_args()
    runs = collect(given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps(runs) + "\n")
    given.out.with_suffix(".md").write_text(table(runs, given))
    plot(runs, given.out.with_suffix(".svg"))
    print(table(runs, given))


if __name__ == "__main__":
    main()
