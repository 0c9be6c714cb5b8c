"""The coverage report: every module with parameters of its own, quantized or kept, and why."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dither.models.layers import is_layer
from dither.nn.batchnorm import FoldedNorm
from dither.nn.experts import is_fused
from dither.nn.linear import PackedWeight, QuantizedConv2d, QuantizedLinear

_REASONS = (
    ("norm", "normalization stays in full precision"),
    ("embed", "embedding stays in full precision"),
    ("position", "position table stays in full precision"),
    ("router", "router of experts stays in full precision"),
)


def coverage(model: nn.Module, kept: Mapping[str, str], remarks: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each module: name, class, parameters, status (`quantized`, `kept` or `folded`) and reason.

    A parameter that several modules share counts for the first. `kept` gives the reasons of layers left out on purpose,
    `remarks` what was done to other modules on the way.
    """
    rows, owners = [], dict[int, str]()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedConv2d):
            count = module.packed.shape[0] * module.packed.shape[1]
            count += 0 if module.bias is None else module.bias.numel()
            rows.append(_row(name, module, count, "quantized", "; ".join(_quantized(name, module, remarks))))
        elif isinstance(module, FoldedNorm):
            rows.append(_row(name, module, 0, "folded", f"folded into {module.layer}"))
        elif not isinstance(module, PackedWeight) and (own := list(module.parameters(recurse=False))):
            count = sum(x.numel() for x in own if owners.setdefault(id(x), name) == name)  # a tied one counts once
            reason = kept.get(name) or remarks.get(name) or _reason(module)
            rows.append(_row(name, module, count, "kept", reason))
    return rows


def _quantized(name: str, module: QuantizedLinear | QuantizedConv2d, remarks: Mapping[str, str]) -> list[str]:
    layout = module.packed.layout
    words = [f"weights {layout.spec}"]
    words += [] if layout.outliers is None else ["outliers kept apart"]  # how many is in the structure, by layer
    words += [] if layout.low_rank is None else [f"correction of rank {layout.low_rank[0]} in {layout.low_rank[1]}"]
    return words + ([remarks[name]] if name in remarks else [])


def _row(name: str, module: nn.Module, parameters: int, status: str, reason: str) -> dict[str, Any]:
    return {"name": name, "class": type(module).__name__, "parameters": parameters, "status": status, "reason": reason}


def _reason(module: nn.Module) -> str:
    if is_layer(module):
        return "not reached by the walk"
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention multiplies by its weights in one call of torch, not through layers"
    if isinstance(module, nn.Linear | nn.Conv2d):
        return f"{type(module).__name__} overrides the forward pass of its base class"
    if is_fused(module):
        return "fused experts are taken apart only in a model that is wholly in memory"
    if any(x.ndim == 3 for x in module.parameters(recurse=False)) and "expert" in type(module).__name__.lower():
        return f"{type(module).__name__} multiplies its fused experts in a way of its own"
    kind = type(module).__name__.lower()
    for word, reason in _REASONS:
        if word in kind:
            return reason
    return f"{type(module).__name__} is neither Linear nor Conv2d nor transformers' Conv1D"
