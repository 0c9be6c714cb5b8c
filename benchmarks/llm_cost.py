"""Time and memory of quantization against the size of a language model, beside llm-compressor's GPTQ.

    python benchmarks/llm_cost.py [--model FOLDER] [--peer ENVIRONMENT/bin/python] [--rounds 3] [--device cuda]

Three Llama models of random weights, since neither time nor memory depends on what they say, then `--model`. Every
quantization runs in a process of its own, from a folder to a quantized model in memory; with `--peer`, the interpreter
of an environment that holds llm-compressor, its GPTQ takes turns with dither's on the same tokens and threads. Runs are
added to docs/results/llm_cost.json, those that are there are skipped; .md and .svg show them. Memory is the peak above
the libraries and the model itself in float32, reading the model included.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from process_cost import Cost
from safetensors.torch import save_file
from torch import multiprocessing

JOB = Path(__file__).with_name("llm_peer_job.py")
PEER = "gptq, llm-compressor"
SIZES = {  # hidden, MLP, blocks, heads: parameters of the blocks
    "10M": (320, 864, 8, 5),
    "40M": (512, 1376, 13, 8),
    "135M": (768, 2048, 19, 12),
}
VOCABULARY = 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--model", help="a folder to measure after the random models")
    parser.add_argument("--peer", help="the interpreter of the environment that holds llm-compressor")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32, help="32 divides the widths of all sizes")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1, help="all of it so many times, in turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/llm_cost"))
    return parser.parse_args()


@contextmanager
def folder(given: argparse.Namespace, size: str) -> Iterator[str]:
    """The model's folder while it is needed."""
    if size not in SIZES:
        yield str(Path(given.model).resolve())
        return
    with tempfile.TemporaryDirectory() as place:
        make_model(size, Path(place))
        yield place


def make_model(size: str, place: Path) -> None:
    """A Llama of random weights, saved in float32, with a tokenizer, which llm-compressor asks for."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, mlp, blocks, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(place)


def run(given: argparse.Namespace, place: str, method: str, windows: torch.Tensor) -> dict[str, Any]:
    """One quantization by dither in this process."""
    from dither.data.calibration import TOKENS
    from dither.evaluation.language import answer
    from dither.models.network import open_network
    from dither.pipeline import quantize
    from dither.recipe import parse_method

    torch.set_num_threads(given.threads)
    cuda = given.device.startswith("cuda")
    batches = [{"input_ids": part} for part in windows.split(max(1, TOKENS // given.length))]
    answer(open_network(place, given.device).model, windows[:1, :32])  # libraries are loaded before memory is read
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = f"int{given.bits}:g{given.group_size}:sym:minmax"
    cost = Cost()
    quantize(place, parse_method(method, {"weights": weights}), batches, device=given.device)
    facts = cost.facts() | {"torch": torch.__version__}
    facts |= {"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {}
    return facts | {"device": torch.cuda.get_device_name() if cuda else f"{given.threads} CPU threads"}


def run_peer(given: argparse.Namespace, place: str, windows: torch.Tensor) -> dict[str, Any]:
    """One quantization by llm-compressor in its own environment."""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        save_file({"windows": windows}, here / "windows.safetensors")
        job = {
            "peer": "llmcompressor", "options": {}, "model": place, "bits": given.bits, "weights": None, "seed": 0,
            "group_size": given.group_size, "threads": given.threads, "device": given.device, "reading": True,
            "windows": str(here / "windows.safetensors"), "facts": str(here / "facts.json"),
        }  # fmt: skip
        (here / "job.json").write_text(json.dumps(job))
        surroundings = os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [given.peer, str(JOB), str(here / "job.json")], check=True, cwd=here, env=surroundings,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found: dict[str, Any] = json.loads((here / "facts.json").read_text())
    return found


def count(place: str) -> tuple[int, int]:
    """Parameters of the model, and of the layers that are quantized."""
    from dither.models.network import open_network

    model = open_network(place).model
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    return sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear)


def collect(given: argparse.Namespace) -> list[dict[str, Any]]:
    path = given.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    sizes = [*given.sizes, *([Path(given.model).resolve().name] if given.model else [])]
    windows = torch.randint(VOCABULARY, (given.samples, given.length), generator=torch.Generator().manual_seed(0))
    for turn in range(given.rounds):
        for size in sizes:
            with folder(given, size) as place:
                parameters, layers = count(place)
                for method in [*given.methods, *([PEER] if given.peer else [])]:
                    key = {
                        "size": size, "method": method, "bits": given.bits, "group_size": given.group_size,
                        "samples": given.samples, "length": given.length, "round": turn,
                    }  # fmt: skip
                    if any(all(one[name] == value for name, value in key.items()) for one in runs):
                        continue
                    if method == PEER:
                        found = run_peer(given, place, windows)
                    else:
                        with multiprocessing.get_context("spawn").Pool(1) as pool:
                            found = pool.apply(run, (given, place, method, windows))
                    found["peak_bytes"] -= 4 * parameters
                    runs.append(key | {"parameters": parameters, "quantized_parameters": layers} | found)
                    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
                    print(json.dumps(runs[-1]), flush=True)
    return runs


def medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each size and method: the median over rounds of every figure."""
    keys = list(dict.fromkeys((one["parameters"], one["size"], one["method"]) for one in runs))
    rows = []
    for parameters, size, method in sorted(keys):
        same = [one for one in runs if (one["size"], one["method"]) == (size, method)]
        middle = {key: statistics.median(one[key] for one in same) for key in ("time_s", "cpu_s", "peak_bytes")}
        rows.append({"size": size, "method": method, "parameters": parameters, "rounds": len(same)} | middle)
    return rows


def table(runs: list[dict[str, Any]]) -> str:
    first, rows = runs[0], medians(runs)
    lines = [
        "# Time and memory against the size of a language model",
        "",
        f"Int{first['bits']}, symmetric, groups of {first['group_size']}; {first['samples']} × {first['length']} "
        f"calibration tokens; {first['device']}, torch {first['torch']}. The models with a size for a name are Llamas "
        "of random weights. From a folder to the quantized model in memory, reading included; memory is the peak above "
        "the libraries and the model in float32. Ratios are to llm-compressor's GPTQ in the same rounds; processor "
        "seconds hardly depend on what else the machine does. Written by `benchmarks/llm_cost.py`.",
        "",
        "| model | parameters, M | in float32, MiB | method | rounds | seconds | CPU s | ratio | peak − model MiB "
        "| peak with the model, ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        model = 4 * one["parameters"]
        peer = next((row for row in rows if (row["size"], row["method"]) == (one["size"], PEER)), None)
        ratio = whole = "–"
        if peer is not None:
            ratio = f"{one['cpu_s'] / peer['cpu_s']:.2f}"
            whole = f"{(one['peak_bytes'] + model) / (peer['peak_bytes'] + model):.2f}"
        peak = one["peak_bytes"] / 2**20
        lines.append(
            f"| {one['size']} | {one['parameters'] / 1e6:.1f} | {model / 2**20:.0f} | {one['method']} "
            f"| {one['rounds']} | {one['time_s']:.1f} | {one['cpu_s']:.1f} | {ratio} | {peak:.0f} | {whole} |"
        )
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]]) -> str:
    from dither.report import canvas

    runs = medians(runs)
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
