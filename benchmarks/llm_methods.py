"""Every weight method on a language model, at several bits, over several calibration draws, beside other tools.

    python benchmarks/llm_methods.py --model FOLDER --calibration valid.txt --evaluation test.txt [--device cuda]

Perplexity is over windows of the evaluation text that do not overlap; all linear layers of the blocks are quantized,
weights only. Runs are added to docs/results/llm_methods.json as they end, and those that are there are skipped; .md and
.svg show them with the rows of llm_peers.json that were made on the same data.

    python benchmarks/llm_methods.py --merge A.json B.json --out docs/results/llm_methods

puts runs that were made apart into one table.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from llm_report import DATA, peer_runs, plot, rows, table
from process_cost import Cost
from torch import multiprocessing

UNIFORM = "int{bits}:g64:asym:minmax"
METHODS = {  # label: method, weight format, bits it is run at (None: all that are asked for)
    "rtn": ("rtn", UNIFORM, None),
    "rtn, symmetric": ("rtn", "int{bits}:g64:sym:minmax", None),
    "rtn, least squares": ("rtn", "int{bits}:g64:asym:mse", None),
    "nf4": ("rtn", "nf4:g64", (4,)),
    "gptq": ("gptq", UNIFORM, None),
    "gptq, symmetric": ("gptq", "int{bits}:g64:sym:minmax", None),
    "gptq, least squares": ("gptq", "int{bits}:g64:asym:mse", None),
    "gptq-fitted": ("gptq-fitted", "int{bits}:g32:asym:tight:realzero:s4.64", None),
    "gptq-learned": ("gptq-learned", "int{bits}:g32:asym:tight:realzero:s4.64", None),
    "gptq-fitted, rows": ("gptq-fitted", "int{bits}:channel:asym:tight:realzero", None),
    "baq, rows": ("baq", "int{bits}:channel:asym:tight", None),
    "baq, law, rows": ("baq+losses=law", "int{bits}:channel:asym:tight", None),
    "baq-levels, rows": ("baq-levels", "mix{bits}:channel:asym:realzero:minmax", None),
    "baq": ("baq", "int{bits}:g32:asym:tight:s4.64", None),
    "awq": ("awq", UNIFORM, None),
    "hqq": ("hqq", "int{bits}:g64", None),
    "adadim": ("adadim", "int{bits}:g64", None),
    "oac": ("oac", UNIFORM, None),
    "signround": ("signround", UNIFORM, None),
    "gwq": ("gwq", UNIFORM, None),
    "qera, rank 8": ("qera+rank=8", UNIFORM, None),
    "lorc": ("lorc", UNIFORM, None),
    "squeezellm": ("squeezellm", "nuq{bits}:channel", None),
    "spqr": ("spqr", "int{bits}:g16:s3.16", None),
    "billm": ("billm", "nuq2:g64:dual", (2,)),
}
DATA_FREE = {"rtn", "rtn, symmetric", "rtn, least squares", "nf4", "hqq", "lorc"}  # a draw would change nothing
SAME = (*DATA, "calibration", "evaluation", "parameters")  # of results that one table may hold
NAMED = ("device", "torch", "at_once")  # may differ, and are named


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of earlier calls, instead of running")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="labels, or LABEL=METHOD@FORMAT")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2], help="for formats that leave them open")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="for draws that are run apart and merged")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--windows", type=int, default=0, help="evaluation windows; 0 for all")
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, spread over the GPUs")
    parser.add_argument("--at-once", type=int, help="runs that share a GPU, of this and other calls; the table says so")
    parser.add_argument("--quick", action="store_true", help="one seed, 64 calibration and 16 evaluation windows")
    parser.add_argument("--peers", type=Path, default=Path("docs/results/llm_peers.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/llm_methods"))
    given = parser.parse_args()
    if not given.merge and not (given.model and given.calibration and given.evaluation):
        parser.error("give --model, --calibration and --evaluation, or --merge")
    if given.quick:
        given.seeds, given.samples, given.windows = 1, 64, 16
    return given


def jobs(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to run, the cheap first seed of everything before the second of anything."""
    for seed in draws(given):
        for bits in given.bits:
            for text in given.methods:
                label, equals, rest = text.partition("=")
                if seed and label in DATA_FREE:
                    continue
                method, _, weights = rest.partition("@")
                only = None
                if not equals:
                    method, weights, only = METHODS[label]
                if (only is None or bits in only) and (
                    "{bits}" in weights or only is not None or bits == given.bits[0]
                ):
                    yield {"label": label, "method": method, "weights": weights.format(bits=bits), "seed": seed}


def draws(given: argparse.Namespace) -> range:
    """The seeds of the calibration draws."""
    return range(given.first_seed, given.first_seed + given.seeds)


class Bench:
    """Full precision measured once, then one quantization a process, so that memory is each run's own."""

    def __init__(self, given: argparse.Namespace) -> None:
        from dither.data.text import open_text
        from dither.models.network import open_network

        self.given = given
        network = open_network(given.model, given.device)
        text, known = open_text(given.evaluation), open_text(given.calibration)
        self.windows = text.windows(network.tokenizer, given.window_length, given.windows or None)
        self.calibration = {
            seed: known.sample(network.tokenizer, given.length, given.samples, seed, given.samples)
            for seed in draws(given)
        }
        self.parameters = sum(p.numel() for p in network.model.parameters())
        self.fp_perplexity = self.perplexity(network.model)

    def perplexity(self, model: torch.nn.Module) -> float:
        from dither.evaluation.language import answer

        return answer(model, self.windows).perplexity

    def facts(self) -> dict[str, Any]:
        given, cuda = self.given, self.given.device.startswith("cuda")
        return {
            "model": Path(given.model).resolve().name,
            "windows": given.windows,
            "window_length": given.window_length,
            "samples": given.samples,
            "length": given.length,
            "calibration": Path(given.calibration).name,
            "evaluation": Path(given.evaluation).name,
            "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
            "torch": torch.__version__,
            "at_once": str(given.at_once or given.workers),
            "fp_perplexity": self.fp_perplexity,
            "parameters": self.parameters,
        }


def run(bench: Bench, job: dict[str, Any]) -> dict[str, Any]:
    """One quantization and what it costs; memory on the CPU is that above one float32 copy of the model."""
    from dither.data.calibration import TOKENS
    from dither.errors import DitherError
    from dither.nn.linear import cache_weights
    from dither.pipeline import quantize
    from dither.recipe import parse_method

    given, cuda = bench.given, bench.given.device.startswith("cuda")
    device = own_device(given.device)
    batches = [{"input_ids": part} for part in bench.calibration[job["seed"]].split(max(1, TOKENS // given.length))]
    warm_up(given.model, device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cost = Cost()
    try:
        method = parse_method(job["method"], {"weights": job["weights"]} if job["weights"] else {})
        result = quantize(given.model, method, batches, count=given.samples, seed=job["seed"], device=device)
    except (DitherError, torch.OutOfMemoryError) as error:
        return job | {"error": str(error)}
    used = cost.facts()
    peak = torch.cuda.max_memory_allocated() if cuda else used["peak_bytes"]
    cache_weights(result.network.model)
    perplexity = bench.perplexity(result.network.model)
    return job | used | {
        "device": bench.facts()["device"],
        "peak_bytes": peak - 4 * bench.parameters,
        "bits_per_weight": result.report.data["totals"]["bits_per_weight"],
        "perplexity": perplexity if math.isfinite(perplexity) else None,
    }  # fmt: skip


def own_device(device: str) -> str:
    """The GPU of this worker, where there are several."""
    if not device.startswith("cuda"):
        return device
    torch.cuda.set_device(sum(multiprocessing.current_process()._identity) % torch.cuda.device_count())
    return f"cuda:{torch.cuda.current_device()}"


@cache
def warm_up(model: str, device: str) -> None:
    """Read and run the model once, so that libraries are loaded before time and memory are counted."""
    from dither.evaluation.language import answer
    from dither.models.network import open_network

    answer(open_network(model, device).model, torch.zeros(1, 8, dtype=torch.int64))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    path = given.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(given)
    found: dict[str, Any] = {"facts": bench.facts(), "runs": []}
    if path.exists():
        found["runs"], found["facts"] = checked([json.loads(path.read_text()), found])
    alone = None if given.device.startswith("cuda") else 1  # the CPU's memory is counted by process
    done = found["runs"]
    todo = [job for job in jobs(given) if not any(all(one.get(k) == v for k, v in job.items()) for one in done)]
    with multiprocessing.get_context("spawn").Pool(given.workers, maxtasksperchild=alone) as pool:
        for one in pool.imap_unordered(partial(run, bench), todo):
            print(json.dumps(one), flush=True)
            if "error" not in one:
                found["runs"].append(one)
                path.write_text(json.dumps(found, indent=1) + "\n")  # a killed call keeps these
    return found


def checked(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs of several results, of equal ones the last; data must agree, machines may differ and are named."""
    facts = [one["facts"] for one in results]
    for one in facts:
        if other := {key for key in SAME if one[key] != facts[0][key]}:
            raise SystemExit(f"these results differ in {sorted(other)}; give another --out")
    runs = {
        (run["label"], run["weights"], run["seed"]): {"device": one["facts"]["device"]} | run
        for one in results for run in one["runs"]
    }  # fmt: skip
    said = {key: [part for one in facts for part in one.get(key, "").split(", ") if part] for key in NAMED}
    named = {key: ", ".join(dict.fromkeys(parts)) for key, parts in said.items()}
    return list(runs.values()), {key: facts[0][key] for key in (*SAME, "fp_perplexity")} | named


def main() -> None:
    given = arguments()
    if given.merge:
        runs, facts = checked([json.loads(path.read_text()) for path in given.merge])
        given.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "runs": runs}, indent=1) + "\n")
    else:
        found = measure(given)
        runs, facts = found["runs"], found["facts"]
    if not runs:
        sys.exit("nothing was measured")
    made = rows([*runs, *peer_runs(given.peers, facts)])
    given.out.with_suffix(".md").write_text(table(made, facts))
    given.out.with_suffix(".svg").write_text(plot(made, facts) + "\n")
    print(table(made, facts))


if __name__ == "__main__":
    main()
