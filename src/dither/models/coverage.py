"""The coverage report: every module with parameters of its own, quantized or kept, and why."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dither.models.layers import is_layer
from dither.nn.linear import PackedWeight, QuantizedConv2d, QuantizedLinear

_REASONS = (
    ("norm", "normalization stays in full precision"),
    ("embed", "embedding stays in full precision"),
    ("position", "position table stays in full precision"),
)


def coverage(model: nn.Module, kept: Mapping[str, str], remarks: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each module: name, class, parameters, status (`quantized` or `kept`) and reason.

    `kept` gives the reasons of layers left out on purpose, `remarks` what was done to other modules on the way.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedConv2d):
            count = module.packed.shape[0] * module.packed.shape[1]
            count += 0 if module.bias is None else module.bias.numel()
            rows.append(_row(name, module, count, "quantized", f"weights {module.packed.spec}"))
        elif not isinstance(module, PackedWeight):
            count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if count:
                rows.append(_row(name, module, count, "kept", kept.get(name) or remarks.get(name) or _reason(module)))
    return rows


def _row(name: str, module: nn.Module, parameters: int, status: str, reason: str) -> dict[str, Any]:
    return {"name": name, "class": type(module).__name__, "parameters": parameters, "status": status, "reason": reason}


def _reason(module: nn.Module) -> str:
    if is_layer(module):
        return "not reached by the walk"
    if isinstance(module, nn.Linear | nn.Conv2d):
        return f"{type(module).__name__} overrides the forward pass of its base class"
    kind = type(module).__name__.lower()
    for word, reason in _REASONS:
        if word in kind:
            return reason
    return f"{type(module).__name__} is neither Linear nor Conv2d"
