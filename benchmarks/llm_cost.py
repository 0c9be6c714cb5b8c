"""Time and memory of quantization against the size of a language model, on random Llama models of three sizes.

    python benchmarks/llm_cost.py [--methods rtn gptq] [--device cuda]

Weights and calibration tokens are random: neither time nor memory depends on what they say. Every quantization runs in
a process of its own. Runs are added to docs/results/llm_cost.json, those that are there are skipped; .md and .svg show
them. Memory is the peak above the libraries and the model itself in float32.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from process_cost import Cost
from torch import multiprocessing

SIZES = {  # hidden, MLP, blocks, heads: parameters of the blocks
    "10M": (320, 864, 8, 5),
    "40M": (512, 1376, 13, 8),
    "135M": (768, 2048, 19, 12),
}
VOCABULARY = 1024
TOKENS = 4096  # of a calibration batch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--weights", default="int4:g64:asym:minmax")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/llm_cost"))
    return parser.parse_args()


def make_model(size: str, folder: Path) -> None:
    """A Llama of random weights, saved in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, blocks, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def run(given: argparse.Namespace, size: str, method: str) -> dict[str, Any]:
    """One quantization in this process."""
    from dither.evaluation.language import answer
    from dither.models.network import open_network
    from dither.pipeline import quantize
    from dither.recipe import parse_method

    cuda = given.device.startswith("cuda")
    windows = torch.randint(VOCABULARY, (given.samples, given.length), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in windows.split(max(1, TOKENS // given.length))]
    with tempfile.TemporaryDirectory() as place:
        make_model(size, Path(place))
        model = open_network(place, given.device).model
        answer(model, windows[:1, :32])  # libraries are loaded before memory is first read
        parameters, layers = _count(model)
        del model
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cost = Cost()
        quantize(place, parse_method(method, {"weights": given.weights}), batches, device=given.device)
        used = cost.facts()
    peak = torch.cuda.max_memory_allocated() if cuda else used["peak_bytes"]
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    return {
        "size": size, "method": method, "weights": given.weights, "samples": given.samples, "length": given.length,
        "device": device, "torch": torch.__version__, "parameters": parameters, "quantized_parameters": layers,
        **used, "peak_bytes": peak - 4 * parameters,
    }  # fmt: skip


def _count(model: torch.nn.Module) -> tuple[int, int]:
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    return sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear)


def collect(given: argparse.Namespace) -> list[dict[str, Any]]:
    path = given.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for size in given.sizes:
        for method in given.methods:
            wanted = {
                "size": size, "method": method, "weights": given.weights, "samples": given.samples,
                "length": given.length,
            }  # fmt: skip
            if any(all(one[key] == value for key, value in wanted.items()) for one in runs):
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(run, (given, size, method)))
            path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
            print(json.dumps(runs[-1]), flush=True)
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    lines = [
        "# Time and memory against the size of a language model",
        "",
        f"Llama models of random weights, {first['samples']} × {first['length']} calibration tokens, on "
        f"{first['device']}, torch {first['torch']}. Memory is the peak above the libraries and the model in float32. "
        "Written by `benchmarks/llm_cost.py`.",
        "",
        "| method | format | parameters, M | model MiB | seconds | CPU s | peak − model MiB | part of the model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(runs, key=lambda one: (one["method"], one["parameters"])):
        model = 4 * one["parameters"]
        lines.append(
            f"| {one['method']} | {one['weights']} | {one['parameters'] / 1e6:.1f} | {model / 2**20:.0f} "
            f"| {one['time_s']:.1f} | {one['cpu_s']:.1f} | {one['peak_bytes'] / 2**20:.0f} "
            f"| {one['peak_bytes'] / model:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]]) -> str:
    from dither.report import canvas

    with canvas.style("llm cost"):
        drawn = canvas.figure(3.4)
        time, memory = drawn.subplots(1, 2)
        canvas.place(drawn, 0.75, 0.3, 0.45, 0.5, space=0.9)
        methods = list(dict.fromkeys(one["method"] for one in runs))
        panels = ((time, "cpu_s", 1, "processor seconds"), (memory, "peak_bytes", 2**20, "peak − model, MiB"))
        for axes, key, unit, words in panels:
            canvas.log_axis(axes, "x", [one["parameters"] / 1e6 for one in runs], pad=1.3)
            canvas.log_axis(axes, "y", [one[key] / unit for one in runs], pad=1.3)
            for index, method in enumerate(methods):
                mark = canvas.mark(index, method)
                mine = sorted((one["parameters"] / 1e6, one[key] / unit) for one in runs if one["method"] == method)
                axes.plot(
                    [x for x, _ in mine], [y for _, y in mine], color=mark.get_color(), marker=mark.get_marker(),
                    markersize=4,
                )  # fmt: skip
            axes.set_xlabel("parameters, millions")
            axes.set_ylabel(words)
        canvas.legend(time, [canvas.mark(index, method) for index, method in enumerate(methods)])
        return canvas.svg(drawn, "Time and memory against model size", f"{len(methods)} methods.")


def main() -> None:
    given = arguments()
    runs = collect(given)
    given.out.with_suffix(".md").write_text(table(runs))
    given.out.with_suffix(".svg").write_text(plot(runs) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
