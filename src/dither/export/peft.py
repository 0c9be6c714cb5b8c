"""peft: low-rank corrections as a LoRA adapter over the network without them, ready to be trained further.

The folder holds `adapter_config.json` and `adapter_model.safetensors` as peft reads them, and in `base` the values of
the codes alone as plain 16-bit weights. The adapter on its base is the quantized network; its factors start where
QERA's initialization for fine-tuning does (Zhang et al., ICLR 2025, arXiv 2410.06040), with a scaling of 1.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from dither.errors import InputError
from dither.export.dequantized import write as write_dequantized
from dither.export.folder import read_back
from dither.export.source import Source, skeleton
from dither.export.written import Written, value_bound
from dither.formats.low_rank import LowRank
from dither.formats.qtensor import QTensor
from dither.models.layers import is_conv1d
from dither.storage import write_json, write_tensors

BASE, CONFIG, FACTORS = "base", "adapter_config.json", "adapter_model.safetensors"


class Uncorrected(Source):
    """A network without its low-rank corrections."""

    def weight(self, layer: str) -> QTensor:
        """The stored weight without its correction."""
        return replace(super().weight(layer), low_rank=None)


def write(source: Source, folder: Path, dtype: str) -> Written:
    """Write base and adapter; `dtype` is that of the base, the adapter is in float32.

    Raises:
        InputError: no layer has a correction, or the base cannot be written.
    """
    corrections = _corrections(source)
    bare = Uncorrected(**{field.name: getattr(source, field.name) for field in fields(source)})
    base = write_dequantized(bare, folder / BASE, dtype)
    tensors = {}
    for name, correction in corrections.items():
        tensors[_key(name, "A")], tensors[_key(name, "B")] = correction.a.contiguous(), correction.b.contiguous()
    write_tensors(tensors, folder / FACTORS, {"format": "pt"})
    write_json(_config(source, corrections, folder / BASE), folder / CONFIG)
    stored = read_back(folder, [FACTORS])

    def weight(name: str) -> Float[np.ndarray, "o i"]:
        total: Float[np.ndarray, "o i"] = base.weight(name)
        if name in corrections:
            a, b = (np.asarray(stored.read(_key(name, side))) for side in "AB")
            total = total + b @ a
        return total

    def bound(name: str) -> Float[np.ndarray, "o i"]:
        total = base.bound(name)
        if name in corrections:  # whose products are summed in another order
            sizes, terms = np.abs(np.asarray(bare.weight(name).dequantize())), corrections[name].rank + 1
            a, b = (np.abs(np.asarray(part)) for part in (corrections[name].a, corrections[name].b))
            total = total + terms * value_bound(sizes + b @ a, torch.float32)
        return total

    files = [*(f"{BASE}/{name}" for name in base.files), FACTORS, CONFIG]
    notes = [f"{len(corrections)} of {len(source.layers)} layers have a low-rank term", *base.notes]
    return Written(files, base.dtype, weight, base.kept, bound, "peft, over the model in base/", notes)


def _corrections(source: Source) -> dict[str, LowRank]:
    found = {name: correction for name in source.layers if (correction := source.weight(name).low_rank) is not None}
    if not found:
        raise InputError(f"{source.name} has no low-rank terms to make an adapter of; quantize with qera or lorc")
    return found


def _key(layer: str, side: str) -> str:
    return f"base_model.model.{layer}.lora_{side}.weight"


def _config(source: Source, corrections: Mapping[str, LowRank], base: Path) -> dict[str, Any]:
    """What peft needs to know: the most common rank for all layers, others by name; alpha = rank."""
    ranks = {name: correction.rank for name, correction in corrections.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    architecture, model = next(iter(source.config.get("architectures") or [""])), skeleton(source)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if architecture.endswith("ForCausalLM") else None,
        "base_model_name_or_path": str(base),
        "target_modules": list(ranks),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(name)) for name in ranks),
        "inference_mode": True,
    }
