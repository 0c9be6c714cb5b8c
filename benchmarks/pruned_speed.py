"""How much faster the forward pass of a pruned ConvNet is than that of the same network in full width.

    python benchmarks/pruned_speed.py --models RESNET MOBILENET [--threads 1]

Every network is rounded to 6 bits by UDFC and runs from dense copies of its codes, so that only widths differ. These
take turns within one process; the factor is that of least times. Writes docs/results/pruned_speed.json and .md.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dither
from dither.distilled import picture_size
from dither.models.network import open_network
from dither.nn.linear import cache_weights
from dither.recipe import parse_method

SHARES = (0.0, 0.1, 0.2, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="pictures at a time")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three turns")
    parser.add_argument("--out", type=Path, default=Path("docs/results/pruned_speed"))
    given = parser.parse_args()
    given.turns = 3 if given.quick else given.turns
    torch.set_num_threads(given.threads)
    runs = [run for folder in given.models for run in measure(folder, given.batches, given.turns)]
    facts = {"threads": given.threads, "turns": given.turns, "torch": torch.__version__, "device": platform.machine()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "runs": runs}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(runs, facts))
    print(table(runs, facts))


@torch.no_grad()
def measure(folder: str, batches: list[int], turns: int) -> Iterator[dict[str, Any]]:
    """Seconds of one forward pass at each share and batch: the least of all turns."""
    network = open_network(folder, "cpu")
    size = picture_size(network)
    models, sizes = {}, {}
    for share in SHARES:
        result = dither.quantize(network.model, parse_method("udfc-corrected", {"prune": share}), None)
        models[share] = cache_weights(result.model)
        sizes[share] = result.report.data["totals"]["size_bytes"]
    for batch in batches:
        x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
        for model in models.values():
            model(x)  # makes the dense copies
        times: dict[float, list[float]] = {share: [] for share in SHARES}
        for _ in range(turns):
            for share, model in models.items():
                times[share].append(seconds(model, x))
        for share in SHARES:
            yield {
                "model": network.name,
                "share": share,
                "batch": batch,
                "forward_s": min(times[share]),
                "times_as_fast": min(times[0.0]) / min(times[share]),
                "size_bytes": sizes[share],
            }


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def table(runs: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown: models and shares down, batches across."""
    batches = list(dict.fromkeys(run["batch"] for run in runs))
    lines = [
        "# Forward pass of pruned ConvNets",
        "",
        f"Times as fast as in full width, in brackets milliseconds: the least of {facts['turns']} turns on "
        f"{facts['threads']} thread(s) of a machine ({facts['device']}) that does other work too, torch "
        f"{facts['torch']}. Written by `benchmarks/pruned_speed.py`.",
        "",
        "| model | channels removed | size, MB | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---" * (3 + len(batches)) + "|",
    ]
    for model, share in dict.fromkeys((run["model"], run["share"]) for run in runs):
        mine = {run["batch"]: run for run in runs if (run["model"], run["share"]) == (model, share)}
        cells = [f"{mine[b]['times_as_fast']:.2f} ({1e3 * mine[b]['forward_s']:.1f})" for b in batches]
        lines.append(
            f"| {model} | {share:.0%} | {mine[batches[0]]['size_bytes'] / 1e6:.3f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
