"""Made-up report data of any size, shaped like what the pipeline writes."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

ROLES = (
    ("attention.q_proj", (192, 192)),
    ("attention.k_proj", (192, 192)),
    ("attention.v_proj", (192, 192)),
    ("attention.o_proj", (192, 192)),
    ("mlp.fc1", (768, 192)),
    ("mlp.fc2", (192, 768)),
)
OFFSETS = {"rtn": 0.0, "gptq": 0.05, "repq": 0.07, "erq": 0.11, "awq": 0.03, "squeezellm": 0.06}


def layer_names(blocks: int) -> list[tuple[str, tuple[int, ...]]]:
    inner = [(f"vit.layers.{i}.{name}", shape) for i in range(blocks) for name, shape in ROLES]
    first = ("vit.embeddings.patch_embeddings.projection", (192, 3, 4, 4))
    return [first, *inner, ("classifier", (10, 192))]


def fake_quantize(blocks: int = 9, seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    layers = []
    for i, (name, shape) in enumerate(layer_names(blocks)):
        error = 10 ** draw.gauss(-2.2 + 0.8 * name.endswith("fc2") + 0.01 * i, 0.25)
        low, high = -draw.uniform(1, 6), draw.uniform(1, 6 + 10 * name.endswith("fc2"))
        low = -0.17 if name.endswith("fc2") else low
        weights = math.prod(shape)
        layers.append(
            {
                "name": name,
                "kind": "Conv2d" if len(shape) == 4 else "Linear",
                "shape": list(shape),
                "weights": "int4:channel:asym",
                "activations": "int4:tensor:asym",
                "bits_per_weight": 4.17,
                "nbytes": round(weights * 4.17 / 8),
                "output_error": error,
                "weight_error": error / 3,
                "time_s": draw.uniform(0.03, 0.4),
                "input_range": [low, high],
                "clip_range": [0.8 * low, 0.7 * high],
                "notes": {"damping": 0.01, "tries": 1} if i % 7 else {"damping": 0.03, "tries": 4},
            }
        )
    operands = [
        {
            "name": f"vit.layers.{i}.attention",
            "operand": operand,
            "activations": "int4:tensor:asym",
            "error": 10 ** draw.gauss(-2 - 0.4 * k, 0.2),
        }
        for i in range(blocks)
        for k, operand in enumerate(("query", "key", "probabilities", "value"))
    ]
    quantized = sum(math.prod(layer["shape"]) for layer in layers)
    parameters = quantized + blocks * 4 * 192 + 12_000
    size = sum(layer["nbytes"] for layer in layers) + 4 * (parameters - quantized)
    return {
        "schema": 1,
        "kind": "quantize",
        "model": {
            "name": "vit_tiny",
            "class": "ViTForImageClassification",
            "parameters": parameters,
            "source": "vit_tiny",
        },
        "recipe": {
            "method": "erq",
            "weights": "int4:channel:asym",
            "activations": "int4:tensor:asym",
            "lam_mean": 0.16,
            "refine_steps": 100,
            "skip": [],
            "calibration": {"count": 32, "batch_size": 8},
        },
        "provenance": {
            "dither": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.7",
            "device": "cpu",
            "seed": 0,
            "model_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "calibration": {"sha256": "60303ae22b998861bce3b28f33eec1be", "count": 32, "source": "calibration"},
        },
        "totals": {
            "parameters": parameters,
            "quantized_parameters": quantized,
            "bits_per_weight": 4.17,
            "size_bytes": size,
            "original_bytes": 4 * parameters,
            "time_s": 9.13,
            "peak_rss_bytes": 812_000_000,
        },
        "layers": layers,
        "operands": operands,
        "coverage": _coverage(layers, blocks),
        "evaluation": {
            "count": 1000,
            "source": "test",
            "top1": 0.861,
            "fp_top1": 0.879,
            "agreement": 0.93,
            "kl": 0.0213,
            "sqnr_db": 17.3,
        },
    }


def _coverage(layers: list[dict[str, Any]], blocks: int) -> list[dict[str, Any]]:
    rows = [
        {
            "name": layer["name"],
            "class": layer["kind"],
            "parameters": math.prod(layer["shape"]),
            "status": "quantized",
            "reason": "weights and inputs",
        }
        for layer in layers
    ]
    norms = [f"vit.layers.{i}.layernorm_{side}" for i in range(blocks) for side in ("before", "after")]
    reason = "normalization stays in full precision"
    rows += [{"name": n, "class": "LayerNorm", "parameters": 384, "status": "kept", "reason": reason} for n in norms]
    return rows


def fake_compare(
    methods: tuple[str, ...] = tuple(OFFSETS),
    settings: tuple[tuple[str, str], ...] = (("int4", "int4"), ("int3", "int4"), ("int3", "int8")),
    seeds: int = 5,
    blocks: int = 9,
    top1: bool = True,
) -> dict[str, Any]:
    draw = random.Random(1)
    names = [name for name, _ in layer_names(blocks)]
    profile = {name: draw.gauss(0, 0.3) for name in names}
    runs = []
    for weights, activations in settings:
        for method in methods:
            for seed in range(seeds):
                bits = int(weights[-1])
                gain = OFFSETS.get(method, 0.02)
                loss = (0.40 if bits == 3 else 0.12) * (0.4 if activations == "int8" else 1.0) * (1 - 6 * gain)
                quality = 0.879 - loss + draw.gauss(0, 0.006)
                runs.append(
                    {
                        "method": method,
                        "label": method,
                        "seed": seed,
                        "weights": weights,
                        "activations": activations,
                        "bits_per_weight": bits + 0.17 + 0.1 * (method == "squeezellm"),
                        "size_bytes": 400_000 * bits + 120_000,
                        "top1": quality if top1 else None,
                        "agreement": quality + 0.05,
                        "kl": 0.9 * (1 - quality) + draw.gauss(0, 0.004),
                        "sqnr_db": 20 * quality,
                        "time_s": {"rtn": 0.6, "gptq": 6.0, "squeezellm": 31.0}.get(method, 9.0) + draw.random(),
                        "layers": [
                            {"name": n, "output_error": 10 ** (profile[n] - bits / 2 - 4 * gain + draw.gauss(0, 0.05))}
                            for n in names
                        ],
                    }
                )
    return {
        "schema": 1,
        "kind": "compare",
        "model": {
            "name": "vit_tiny",
            "class": "ViTForImageClassification",
            "parameters": 4_028_170,
            "source": "zoo/vit_tiny",
        },
        "provenance": {"dither": "0.1.0", "torch": "2.13.0", "device": "cpu"},
        "reference": {"top1": 0.879 if top1 else None, "size_bytes": 16_112_680, "bits_per_weight": 32},
        "runs": runs,
        "failures": [
            {"method": "gptq", "seed": 1, "error": "NumericalError: vit.layers.3.mlp.fc2: expected a positive Gram"}
        ],
        "evaluation": {"count": 1000, "source": "test"},
    }


@pytest.fixture
def quantize_data() -> Callable[..., dict[str, Any]]:
    return fake_quantize


@pytest.fixture
def compare_data() -> Callable[..., dict[str, Any]]:
    return fake_compare
