"""What reparameterization is for: a model whose LayerNorm channels differ in size, as those of large networks do.

    python benchmarks/stress_reparameterization.py --model MODEL_FOLDER --calibration train.npz --data test.npz

A seeded log-normal factor multiplies each LayerNorm channel and divides the weights that read it: in full precision the
function is the same, but one activation range a tensor no longer fits all channels. This is a constructed case, and the
table says so. Writes docs/results/stress_reparameterization.json and .md.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither.data import open_images
from dither.evaluation import evaluate_classifier, predict
from dither.models.anatomy import read_anatomy
from dither.models.links import find_links
from dither.models.network import open_network
from dither.nn.linear import cache_weights
from dither.pipeline import quantize
from dither.recipe import parse_method

METHODS = ("rtn", "gptq", "repq", "repq-gptq", "erq+reparameterize=false", "erq-v2", "erq")


def rescale(model: nn.Module, pixels: torch.Tensor, sigma: float, seed: int) -> int:
    """Multiply the channels of every linked norm by exp(sigma z) and divide the weights behind it; how many norms."""
    generator, changed = torch.Generator().manual_seed(seed), 0
    for unit in read_anatomy(model, lambda: model(pixels)).units:
        block, inputs = model.get_submodule(unit.name), []
        handle = block.register_forward_pre_hook(
            lambda _m, args, kwargs, seen=inputs: seen.append((args, kwargs)), with_kwargs=True
        )
        model(pixels)
        handle.remove()
        args, kwargs = inputs[0]
        for link in find_links(block, lambda block=block, args=args, kwargs=kwargs: block(*args, **kwargs)).found:
            norm = block.get_submodule(link.norm)
            factor = torch.exp(sigma * torch.randn(norm.weight.shape, generator=generator)).to(norm.weight)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            for name in link.layers:
                block.get_submodule(name).weight.div_(factor)
            changed += 1
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/stress_reparameterization"))
    given = parser.parse_args()
    runs, facts = collect(given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "runs": runs}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(runs, facts))
    print(table(runs, facts))


@torch.no_grad()
def collect(given: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    network = open_network(given.model, given.device)
    pictures = open_images(given.data)
    pictures = pictures if given.count is None else pictures.sample(given.count, seed=0)
    pixels = torch.cat(list(pictures.pixel_batches(network.processor, 500)))
    labels = None if pictures.labels is None else [int(label) for label in pictures.labels]
    reference = predict(network.model, pixels.split(250), given.device)
    norms = rescale(network.model, pixels[:4].to(given.device), given.sigma, seed=0)
    changed = predict(network.model, pixels.split(250), given.device)
    facts = {
        "model": network.name,
        "sigma": given.sigma,
        "norms": norms,
        "count": len(pixels),
        "seeds": given.seeds,
        "device": given.device,
        "largest_logit_change": float((changed - reference).abs().max() / reference.abs().max()),
    }
    runs = []
    for seed in range(given.seeds):
        for text in METHODS:
            method = parse_method(text, {"weights": "int4", "activations": "int4"})
            result = quantize(network.model, method, open_images(given.calibration), count=32, seed=seed)
            cache_weights(result.model)
            found = evaluate_classifier(
                result.model, pixels.split(250), reference=reference, class_ids=labels, device=given.device
            )
            runs.append({"method": text, "seed": seed, **found.to_json()})
            print(text, seed, runs[-1]["top1"], flush=True)
    return runs, facts


def table(runs: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# A constructed stress case: LayerNorm channels of unequal size",
        "",
        f"`{facts['model']}` with the channels of {facts['norms']} norms multiplied by exp({facts['sigma']} z), z "
        "normal, and the weights behind them divided by the same: in full precision the logits change by "
        f"{facts['largest_logit_change']:.1e} of the largest. W4A4, {facts['count']} pictures, mean ± standard "
        f"deviation over {facts['seeds']} calibration draws, on {facts['device']}. Written by "
        "`benchmarks/stress_reparameterization.py`.",
        "",
        f"Full precision: {100 * runs[0]['fp_top1']:.2f} %.",
        "",
        "| method | top-1 % | agreement % | SQNR dB |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        rows = [run for run in runs if run["method"] == method]
        cells = [
            spread([scale * run[key] for run in rows])
            for key, scale in (("top1", 100), ("agreement", 100), ("sqnr_db", 1))
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
