"""Calibration and GPTQ of a Llama-shaped model of random weights on 1 and on 2 GPUs: time, speed-up, memory.

    python benchmarks/two_gpus.py                    # 3.3 billion parameters, 6 blocks measured; about 5 minutes
    python benchmarks/two_gpus.py --quick            # a tiny model on 1 and 2 CPU ranks; nothing is written

The model is made once, in bfloat16 in a temporary folder, and quantized by torchrun's ranks, each with its own GPU.
Weights and tokens are random: neither time nor memory depends on what they say. Only the first `--measured` blocks are
quantized; time is that of a block in the middle, without the first, which compiles kernels. docs/results/two_gpus.json
and .md are written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

QUICK = {
    "hidden": 128, "mlp": 384, "heads": 4, "kv_heads": 2, "blocks": 4, "measured": 3, "vocabulary": 256, "samples": 64,
    "length": 128, "device": "cpu",
}  # fmt: skip
TOKENS = 4096  # of a calibration batch
COMPARED = "model.layers.{block}.mlp.down_proj"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--measured", type=int, default=6, help="of the blocks; at least 3")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--weights", default="int4:g128:asym:minmax")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the model and the ranks' figures go (default: temporary)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # what torchrun starts: the settings in this file
    given = parser.parse_args()
    if given.quick:
        vars(given).update(QUICK)
    elif given.out is None:
        given.out = Path("docs/results/two_gpus")
    return given


def make_model(given: argparse.Namespace, folder: Path) -> int:
    """A Llama of random weights in bfloat16; returns how many parameters it has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=given.vocabulary, hidden_size=given.hidden, intermediate_size=given.mlp,
        num_hidden_layers=given.blocks, num_attention_heads=given.heads, num_key_value_heads=given.kv_heads,
        max_position_embeddings=max(2048, given.length),
    )  # fmt: skip
    with torch.device(given.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def job(path: Path) -> None:
    """One rank's part of a quantization; its figures go into the folder of the job."""
    import dither
    from dither.methods.gptq import GPTQ

    given = json.loads(path.read_text())
    cuda, rank = given["device"] == "cuda", int(os.environ["RANK"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(
        given["vocabulary"], (given["samples"], given["length"]), generator=torch.Generator().manual_seed(0)
    )
    batches = [{"input_ids": part} for part in tokens.split(max(1, TOKENS // given["length"]))]
    others = [f"model.layers.{block}.*" for block in range(given["measured"], given["blocks"])]
    done: list[float] = []

    def progress(_name: str, _done: int, _total: int) -> None:
        if cuda:
            torch.cuda.synchronize()
        done.append(perf_counter())

    started = perf_counter()
    method = GPTQ(weights=given["weights"], skip=tuple(others))
    result = dither.quantize(
        given["model"], method, batches, device=given["device"], progress=progress,
        spill_budget=2**36,  # no rank waits for a disk; by default activations over 1 GiB are spilled
    )  # fmt: skip
    layers = result.report.data["layers"]
    steady = [layer for layer in layers if not layer["name"].startswith("model.layers.0.")]
    packed = result.model.get_submodule(COMPARED.format(block=given["measured"] - 1)).packed
    figures = {
        "rank": rank,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "batches": len(batches),
        "whole_s": perf_counter() - started,
        "block_s": (done[-1] - done[0]) / (len(done) - 1),
        "solving_s": sum(layer["time_s"] for layer in steady) / (len(done) - 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else result.report.data["totals"]["peak_rss_bytes"],
        "output_error": sum(layer["output_error"] for layer in layers) / len(layers),
    }
    if rank == 0:
        from safetensors.torch import save_file

        save_file({"codes": packed.qtensor().codes.cpu()}, path.with_suffix(".safetensors"))
    path.with_name(f"{path.stem}-rank{rank}.json").write_text(json.dumps(figures))


def run(given: argparse.Namespace, place: Path, ranks: int) -> list[dict[str, Any]]:
    """The figures of every rank of one quantization."""
    path = place / f"ranks{ranks}.json"
    path.write_text(json.dumps({**_plain(given), "model": str(place / "model")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run([*command, __file__, "--job", str(path)], check=True)
    return [json.loads(path.with_name(f"{path.stem}-rank{rank}.json").read_text()) for rank in range(ranks)]


def collect(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    parameters = make_model(given, place / "model")
    if given.device == "cuda":
        torch.cuda.empty_cache()
    runs = {ranks: run(given, place, ranks) for ranks in given.ranks}
    codes = {ranks: load_file(place / f"ranks{ranks}.safetensors")["codes"] for ranks in given.ranks}
    first = codes[given.ranks[0]]
    rows = []
    for ranks, found in runs.items():
        rows.append({
            "ranks": ranks,
            "block_s": max(one["block_s"] for one in found),
            "speed_up": runs[given.ranks[0]][0]["block_s"] / max(one["block_s"] for one in found),
            "solving_s": found[0]["solving_s"],
            "whole_s": max(one["whole_s"] for one in found),
            "peak_bytes": [one["peak_bytes"] for one in found],
            "output_error": found[0]["output_error"],
            "same_codes": float((codes[ranks] == first).double().mean()),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    facts = {"parameters": parameters, "batches": runs[given.ranks[0]][0]["batches"], "torch": torch.__version__}
    facts["devices"] = sorted({one["device"] for found in runs.values() for one in found})
    return {"settings": _plain(given), **facts, "runs": rows}


def _plain(given: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(given).items() if key not in ("folder", "out", "job", "quick", "ranks")}


def table(found: dict[str, Any]) -> str:
    given = found["settings"]
    lines = [
        "# Calibration and GPTQ on one and two GPUs",
        "",
        f"A Llama-shaped model of {found['parameters'] / 1e9:.2f} billion random parameters (hidden {given['hidden']}, "
        f"MLP {given['mlp']}, {given['blocks']} blocks), `{given['weights']}`, {given['samples']} × {given['length']} "
        f"calibration tokens in {found['batches']} batches, on {', '.join(found['devices'])}, torch {found['torch']}. "
        f"The first {given['measured']} blocks are quantized; seconds of a block are the mean without the first, which "
        "compiles kernels. Solving is the sum over a block's layers, which the ranks share. The whole takes in reading "
        "and hashing the model. Every rank holds the model in float32. Written by `benchmarks/two_gpus.py`.",
        "",
        "| GPUs | seconds a block | speed-up | of it solving, all layers | whole, s | peak GiB of each GPU "
        "| mean output error | codes as with the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found["runs"]:
        peaks = ", ".join(f"{peak / 2**30:.1f}" for peak in one["peak_bytes"])
        lines.append(
            f"| {one['ranks']} | {one['block_s']:.2f} | {one['speed_up']:.2f} | {one['solving_s']:.2f} "
            f"| {one['whole_s']:.0f} | {peaks} | {one['output_error']:.6f} | {100 * one['same_codes']:.4f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    given = arguments()
    if given.job is not None:
        job(given.job)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        found = collect(given, Path(place))
    print(table(found))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
