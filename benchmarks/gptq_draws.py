"""Symmetric GPTQ beside llm-compressor's over several calibration draws, and how far the two are one algorithm.

    python benchmarks/gptq_draws.py --model FOLDER --calibration valid.txt --evaluation held_out.txt \
        --peer ENVIRONMENT/bin/python [--seeds 3] [--bits 3]

Both get the same windows. Perplexity is of both results under dither's evaluation. For the first two blocks the script
counts the codes that differ, with dither's scales in float16, as they are stored, and in float32, as llm-compressor
keeps them while it rounds: the inputs of the first block are the same, those of the second are not. Runs are added to
docs/results/gptq_draws.json, those that are there are skipped.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dither.data.calibration import TOKENS
from dither.data.text import open_text
from dither.evaluation.language import answer
from dither.formats.spec import QuantSpec
from dither.methods.gptq import GPTQ
from dither.models.network import open_network
from dither.nn.linear import cache_weights
from dither.pipeline import quantize

JOB = Path(__file__).with_name("llm_peer_job.py")
BLOCKS = 2  # whose codes are compared


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--peer", required=True, help="the interpreter of the environment that holds llm-compressor")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gptq_draws"))
    return parser.parse_args()


def peer_weights(given: argparse.Namespace, windows: Tensor) -> dict[str, Tensor]:
    """What llm-compressor makes of the model on these windows."""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        save_file({"windows": windows}, here / "windows.safetensors")
        job = {
            "peer": "llmcompressor", "options": {}, "model": str(Path(given.model).resolve()), "bits": given.bits,
            "group_size": given.group_size, "seed": 0, "threads": given.threads, "device": "cpu",
            "windows": str(here / "windows.safetensors"), "weights": str(here / "weights.safetensors"),
            "facts": str(here / "facts.json"),
        }  # fmt: skip
        (here / "job.json").write_text(json.dumps(job))
        surroundings = os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
        subprocess.run([given.peer, str(JOB), str(here / "job.json")], check=True, cwd=here, env=surroundings,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        return load_file(here / "weights.safetensors")


def dither_weights(
    given: argparse.Namespace, model: Any, windows: Tensor, scale_dtype: str
) -> tuple[Any, dict[str, Tensor]]:
    """dither's own result, and its weights by name."""
    spec = QuantSpec.parse(f"int{given.bits}:g{given.group_size}:sym:minmax").model_copy(
        update={"scale_dtype": scale_dtype}
    )
    batches = [{"input_ids": part} for part in windows.split(max(1, TOKENS // given.length))]
    result = quantize(model, GPTQ(weights=spec), batches, device="cpu").model
    cache_weights(result)
    return result, {name: m.weight for name, m in result.named_modules() if hasattr(m, "packed")}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor], block: int) -> float:
    """The share of weights of a block that lie on another code: further apart than half a step of their group."""
    wrong = count = 0
    for name in (name for name in ours if f".layers.{block}." in name):
        a, b = ours[name], theirs[name].view_as(ours[name])
        near = (a - b).abs() <= 1e-3 * b.abs().clamp_min(1e-8)  # float16 rounds scales within it, and codes are whole
        wrong, count = wrong + int((~near).sum()), count + a.numel()
    return wrong / count


def run(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    network = open_network(given.model)
    windows = open_text(given.calibration).sample(network.tokenizer, given.length, given.samples, seed, given.samples)
    judged = open_text(given.evaluation).windows(network.tokenizer, 1024, given.windows or None)
    full = answer(network.model, judged).perplexity
    theirs = peer_weights(given, windows)
    model, ours = dither_weights(given, given.model, windows, "float16")
    found = {"full": full, "dither": answer(model, judged).perplexity}
    for block in range(BLOCKS):
        found[f"float16 {block}"] = differing(ours, theirs, block)
    del model
    short = open_network(given.model).model
    short.model.layers = short.model.layers[:BLOCKS]
    short.config.num_hidden_layers = BLOCKS
    _, exact = dither_weights(given, short, windows, "float32")
    for block in range(BLOCKS):
        found[f"float32 {block}"] = differing(exact, theirs, block)
    for name, layer in network.model.named_modules():
        if isinstance(layer, nn.Linear) and name in theirs:
            layer.weight.data = theirs[name].view_as(layer.weight)
    return found | {"llm-compressor": answer(network.model, judged).perplexity}


def table(runs: list[dict[str, Any]], given: argparse.Namespace) -> str:
    lines = [
        f"# Symmetric GPTQ at {given.bits} bits, draw by draw",
        "",
        f"`{Path(given.model).name}`, groups of {given.group_size}, {given.samples} × {given.length} tokens; "
        f"perplexity on {given.windows or 'all'} windows of 1,024 tokens of `{Path(given.evaluation).name}`; full "
        f"precision {runs[0]['full']:.2f}. The last columns: the share of codes of the first and the second block that "
        "differ between the tools, with scales in float16 and in float32. Written by `benchmarks/gptq_draws.py`.",
        "",
        "| draw | dither | llm-compressor | float16: first block | second | float32: first block | second |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in runs:
        shares = " | ".join(
            f"{one[f'{kind} {block}']:.2%}" for kind in ("float16", "float32") for block in range(BLOCKS)
        )
        lines.append(f"| {one['seed']} | {one['dither']:.2f} | {one['llm-compressor']:.2f} | {shares} |")
    if len(runs) > 1:
        spread = (f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}"
                  for x in ([one[name] for one in runs] for name in ("dither", "llm-compressor")))  # fmt: skip
        lines.append(f"| mean | {' | '.join(spread)} | | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    path = given.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for seed in range(given.seeds):
        key = {name: getattr(given, name) for name in ("bits", "group_size", "samples", "length", "windows")} | {
            "seed": seed
        }
        if not any(all(one[name] == value for name, value in key.items()) for one in runs):
            with torch.no_grad():
                runs.append(key | run(given, seed))
            path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(runs, given))
    print(table(runs, given))


if __name__ == "__main__":
    main()
