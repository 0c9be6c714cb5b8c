"""Quantize a Llama of 7B shape block by block, measure the peak memory; writes docs/results/bigger_than_memory.*.

    python benchmarks/bigger_than_memory.py [--layers 3] [--samples 2] [--tokens 512] [--methods rtn] [--work FOLDER]

The weights are random (bf16, written shard by shard), as memory and time do not depend on their values. Every method
runs in a process of its own, whose peak resident memory the operating system counts, saving and verification
included. With fewer than 32 layers the time of the whole model is extrapolated from the time of a block, and the
result says so; the memory is that of one block, however many there are.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LAYERS = 32  # of the whole model
METHODS = {"rtn": "int4:g128:asym:minmax", "gptq": "int4:g128:asym:minmax"}
LIMIT = 8 * 2**30
CHILD = """
import json, resource, sys
from time import perf_counter
import torch
from dither.pipeline import quantize
from dither.run import peak_rss
method, weights, model, output, samples, tokens = sys.argv[1:]
before, marks = peak_rss(), []
def progress(name, done, total):
    marks.append(perf_counter() - started)
    print(f"{method} {name} {done}/{total} {marks[-1]:.0f} s, peak {peak_rss() / 2**30:.2f} GiB", file=sys.stderr)
from dither.recipe import build_method
generator = torch.Generator().manual_seed(0)
batches = [{"input_ids": torch.randint(0, 32000, (1, int(tokens)), generator=generator)} for _ in range(int(samples))]
started = perf_counter()
result = quantize(model, build_method(method, {"weights": weights}), batches, output=output,
    stream=True, spill_budget=2**22, progress=progress)
totals = result.report.data["totals"]
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"before": before, "peak": peak_rss(), "expected": totals["expected_memory_bytes"],
    "cpu_s": used.ru_utime + used.ru_stime,
    "units": marks, "time_s": perf_counter() - started, "bits_per_weight": totals["bits_per_weight"]}))
"""


def main() -> None:
    """Make the model, run every method, write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "bigger_than_memory")
    parser.add_argument("--work", default=None, help="a folder with room for the weights (default: a temporary one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work, prefix="bigger-than-memory-") as work:
        model = Path(work) / "model"
        size = make_model(model, given.layers)
        runs: dict[str, dict[str, Any]] = {}
        for name in given.methods.split(","):
            runs[name] = measure(name, model, Path(work) / name, given)
            write(given, size, runs)  # what took long is not lost to what comes after it


def make_model(folder: Path, layers: int) -> int:
    """A random Llama in bf16, a file for each block and one for the rest; returns the bytes of all files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: drawn(shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return int(total)


def drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm, else what keeps the size of what it multiplies."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values: torch.Tensor = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return values.bfloat16()


def measure(method: str, model: Path, output: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One method in a process of its own."""
    arguments = [method, METHODS[method], str(model), str(output), str(given.samples), str(given.tokens)]
    started = perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    blocks = [after - before for before, after in zip(found["units"], found["units"][1:], strict=False)]
    found["block_s"] = sum(blocks) / len(blocks)
    found["whole_s"] = found["time_s"] + (LAYERS - given.layers) * found["time_s"] / given.layers
    found["stored_bytes"] = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{method}: peak {found['peak'] / 2**30:.2f} GiB, {perf_counter() - started:.0f} s", file=sys.stderr)
    shutil.rmtree(output)
    return found


def write(given: argparse.Namespace, size: int, runs: dict[str, dict[str, Any]]) -> None:
    """The JSON and the table made of it."""
    facts = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                    "torch": torch.__version__, "threads": torch.get_num_threads()},
        "model": {"hidden": 4096, "mlp": 11008, "heads": 32, "vocabulary": 32000, "layers": given.layers,
                  "bytes": size},
        "calibration": {"samples": given.samples, "tokens": given.tokens},
        "limit_bytes": LIMIT, "formats": METHODS, "runs": runs,
    }  # fmt: skip
    given.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(facts))


def table(facts: dict[str, Any]) -> str:
    """What the JSON says, for readers."""
    layers = facts["model"]["layers"]
    rows = [
        f"| {name} {facts['formats'][name]} | {gib(run['expected'])} | {gib(run['before'])} | **{gib(run['peak'])}** "
        f"| {run['block_s']:.0f} s | {run['time_s'] / 60:.1f} min | {run['cpu_s'] / 60:.1f} min "
        f"| {run['whole_s'] / 60:.0f} min |"
        for name, run in facts["runs"].items()
    ]
    whole = "measured" if layers >= LAYERS else f"extrapolated from {layers} blocks"
    cores, memory = facts["machine"]["cores"], facts["machine"]["memory_bytes"]
    samples, tokens = facts["calibration"]["samples"], facts["calibration"]["tokens"]
    return f"""# Bigger than memory

A Llama of 7B shape (hidden 4096, MLP 11008, 32 heads, vocabulary 32000, random bf16 weights in shards), read block by
block on {cores} cores of a machine with {gib(memory)}. Its weights in float32 are 25 GiB, as they would be in memory.
{layers} of its {LAYERS} blocks were run; memory does not grow with their number.
Calibration: {samples} × {tokens} random tokens, activations over 4 MiB on disk.

| method | planned | Python and torch alone | peak memory | a block | run | processor | {LAYERS} blocks, {whole} |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The peak is the operating system's count for the whole process, saving and verification included; the limit asked for
is {gib(facts["limit_bytes"])}. Planned is what `--dry-run` states, beside Python and torch.
"""


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
