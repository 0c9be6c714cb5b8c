"""Language-model weight quantization by other tools, each in an environment of its own, on equal data and evaluation.

    python benchmarks/llm_peers.py --model FOLDER --calibration valid.txt --evaluation test.txt \
        --peer hqq --python ENVIRONMENT/bin/python --bits 4 3 2

Windows of calibration tokens are drawn as dither draws them and handed over in a file. The tool returns dequantized
weights, which are put into the float32 model and measured by dither's perplexity. Every run is added to
docs/results/llm_peers.json; a run that is there already is skipped. `--set iters=50` passes an option to the tool.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dither.data.text import open_text
from dither.evaluation.language import answer

JOB = Path(__file__).with_name("llm_peer_job.py")
KEY = ("model", "peer", "options", "bits", "group_size", "seed", "samples", "length", "windows", "window_length")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--peer", required=True, choices=("hqq", "bitsandbytes", "llmcompressor", "autoround"))
    parser.add_argument("--python", required=True, help="the interpreter of the environment that holds the peer")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", dest="options")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows; 0 for all")
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="what the peer works on, and the evaluation")
    parser.add_argument("--out", type=Path, default=Path("docs/results/llm_peers.json"))
    return parser.parse_args()


class Bench:
    """One full-precision model and its evaluation windows; `measure` puts a tool's weights into it."""

    def __init__(self, given: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.given, self.tokenizer = given, AutoTokenizer.from_pretrained(given.model)
        self.model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        text = open_text(given.evaluation)
        self.model.to(given.device)
        self.windows = text.windows(self.tokenizer, given.window_length, given.windows or None)

    def calibration(self, seed: int) -> Tensor:
        windows = open_text(self.given.calibration)
        return windows.sample(self.tokenizer, self.given.length, self.given.samples, seed, self.given.samples)

    def measure(self, weights: dict[str, Tensor]) -> float:
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
        if set(layers) != set(weights):
            raise SystemExit(f"the peer returned other layers: {sorted(set(layers) ^ set(weights))[:5]}")
        for name, layer in layers.items():
            layer.weight.data = weights[name].view_as(layer.weight).to(layer.weight.device)
        return answer(self.model, self.windows).perplexity


def run(bench: Bench, given: argparse.Namespace, bits: int, seed: int) -> dict[str, Any]:
    """One quantization in the peer's environment and its perplexity here."""
    windows = bench.calibration(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file({"windows": windows}, folder / "windows.safetensors")
        job = {
            "peer": given.peer,
            "options": options(given),
            "model": str(Path(given.model).resolve()),
            "bits": bits,
            "group_size": given.group_size,
            "seed": seed,
            "threads": given.threads,
            "device": given.device,
            "windows": str(folder / "windows.safetensors"),
            "weights": str(folder / "weights.safetensors"),
            "facts": str(folder / "facts.json"),
        }
        (folder / "job.json").write_text(json.dumps(job))
        passive = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}  # waiting threads are not counted as work
        surroundings = os.environ | passive | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
        subprocess.run([given.python, str(JOB), str(folder / "job.json")], check=True, cwd=folder, env=surroundings)
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        perplexity = bench.measure(load_file(folder / "weights.safetensors"))
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    return facts | {
        "perplexity": perplexity if math.isfinite(perplexity) else None,
        "threads": given.threads,
        "calibration_sha256": digest,
    }


def options(given: argparse.Namespace) -> dict[str, Any]:
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in given.options)}


def main() -> None:
    given = arguments()
    bench: Bench | None = None
    for seed in given.seeds:
        for bits in given.bits:
            known = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
            key = {
                "model": Path(given.model).resolve().name,
                "peer": given.peer,
                "options": options(given),
                "bits": bits,
                "group_size": given.group_size,
                "seed": seed,
                "samples": given.samples,
                "length": given.length,
                "windows": given.windows,
                "window_length": given.window_length,
            }
            if any(all(one[name] == key[name] for name in KEY) for one in known):
                continue
            bench = bench or Bench(given)
            found = key | run(bench, given, bits, seed)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({"runs": [*known, found]}, indent=1) + "\n")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
