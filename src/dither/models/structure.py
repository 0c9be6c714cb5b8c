"""The structure of a quantized network as plain data, so that a file can say which modules its tensors belong to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dither.errors import StorageError
from dither.formats.layout import Layout
from dither.formats.spec import QuantSpec
from dither.models.batchnorm import restore_fold
from dither.models.layers import is_layer
from dither.nn.activation import ActivationQuantizer
from dither.nn.attention import AttentionOperands, quantize_attention
from dither.nn.batchnorm import FoldedNorm
from dither.nn.experts import Experts, is_fused
from dither.nn.linear import ConvGeometry, PackedWeight, QuantizedConv2d, QuantizedLinear

SCHEMA = 1
Structure = dict[str, Any]


def describe(model: nn.Module, prefix: str = "") -> Structure:
    """Quantized layers, attention operands, norm biases, experts taken apart, folded norms, by name below `prefix`."""
    structure: Structure = {"schema": SCHEMA, "layers": {}, "attention": {}, "biases": {}}
    for name, module in model.named_modules(prefix=prefix):
        if isinstance(module, QuantizedLinear | QuantizedConv2d):
            structure["layers"][name] = {
                **describe_weight(module.packed.layout),
                "bias": module.bias is not None,
                "activations": _describe_quantizer(module.input_quantizer),
                **({"groups": module.groups} if isinstance(module, QuantizedConv2d) and module.groups > 1 else {}),
            }
        elif isinstance(module, AttentionOperands):
            owner = name.rpartition(".")[0]
            structure["attention"][owner] = {key: _describe_quantizer(q) for key, q in module.named_children()}
        elif _is_bare_norm(module):
            structure["biases"][name] = module.get_parameter("bias").shape[0]
        elif isinstance(module, Experts):
            structure.setdefault("experts", []).append(name)
        elif isinstance(module, FoldedNorm):
            structure.setdefault("folded", {})[name] = module.layer
    return structure


def describe_weight(layout: Layout) -> dict[str, Any]:
    """Format and shape; what else is stored is named only where there is any."""
    entry: dict[str, Any] = {"weights": layout.spec.model_dump(mode="json"), "shape": list(layout.shape)}
    entry |= {} if layout.outliers is None else {"outliers": layout.outliers}
    entry |= {} if layout.low_rank is None else {"low_rank": list(layout.low_rank)}
    entry |= {} if layout.widths is None else {"widths": list(layout.widths)}
    return entry | ({"regrouped": True} if layout.regrouped else {})


def read_layout(entry: Mapping[str, Any]) -> Layout:
    """What is stored of the weight that an entry of `layers` describes."""
    rank = entry.get("low_rank")
    shape = (entry["shape"][0], entry["shape"][1])
    low_rank = None if rank is None else (rank[0], rank[1])
    regrouped, widths = entry.get("regrouped", False), entry.get("widths")
    counts = None if widths is None else tuple(widths)
    return Layout(QuantSpec(**entry["weights"]), shape, entry.get("outliers"), low_rank, regrouped, counts)


def _describe_quantizer(quantizer: nn.Module | None) -> dict[str, Any] | None:
    if not isinstance(quantizer, ActivationQuantizer):
        return None
    channels = 1 if quantizer.spec.dynamic else quantizer.scale.numel()
    entry = {"spec": quantizer.spec.model_dump(mode="json"), "channels": channels}
    return entry if quantizer.offset is None else {**entry, "offset": len(quantizer.offset)}


def _is_bare_norm(module: nn.Module) -> bool:
    """A leaf with one-dimensional weight and bias: a norm whose bias may have been created by a fold."""
    weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
    return weight is not None and bias is not None and weight.ndim == 1


def rebuild(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Replace modules of a full-precision skeleton by empty quantized ones, in place, ready for a state to be loaded.

    Raises:
        StorageError: the skeleton lacks a module that the structure names, or the structure is of a newer schema.
    """
    if structure.get("schema") != SCHEMA:
        raise StorageError(f"expected quantization schema {SCHEMA}, got {structure.get('schema')}; update dither")
    for name in structure.get("experts", ()):
        _take_apart(model, name)
    for name, layer in structure.get("folded", {}).items():
        _module(model, layer)
        restore_fold(model, _module(model, name), name, layer)
    for name, entry in structure["layers"].items():
        holder, _, leaf = name.rpartition(".")
        empty = _empty_layer(_module(model, name), name, entry)
        setattr(_module(model, holder), leaf, empty)
    _untie(model, structure["layers"])
    for owner, operands in structure["attention"].items():
        quantizers = {key: quantizer for key, one in operands.items() if (quantizer := _empty_quantizer(one))}
        quantize_attention(_module(model, owner), AttentionOperands(quantizers))
    for name, size in structure["biases"].items():
        norm = _module(model, name)
        if getattr(norm, "bias", None) is None:
            like = norm.get_parameter("weight")
            norm.bias = nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device), requires_grad=False)


def _take_apart(model: nn.Module, name: str) -> None:
    module, (holder, _, leaf) = _module(model, name), name.rpartition(".")
    if isinstance(module, Experts):
        return
    if not is_fused(module):
        raise StorageError(f"{name} is stored as experts, but is a {type(module).__name__} here")
    setattr(_module(model, holder), leaf, Experts(module))


def _untie(model: nn.Module, names: Mapping[str, Any]) -> None:
    """Let transformers no longer tie a table of embeddings to a layer that has codes of its own now."""
    ties = getattr(model, "all_tied_weights_keys", None)
    for key, source in dict(ties or {}).items():
        if {str(key).rpartition(".")[0], str(source).rpartition(".")[0]} & set(names):
            ties.pop(key)  # type: ignore[union-attr]


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise StorageError(f"the stored network names {name!r}, which {type(model).__name__} does not have") from None


def _empty_layer(layer: nn.Module, name: str, entry: Mapping[str, Any]) -> QuantizedLinear | QuantizedConv2d:
    if not is_layer(layer):
        raise StorageError(f"{name} is stored as a quantized layer, but is a {type(layer).__name__} here")
    dtype = layer.weight.dtype
    packed = PackedWeight(read_layout(entry))
    bias = torch.zeros(packed.shape[0], dtype=dtype) if entry["bias"] else None
    quantizer = _empty_quantizer(entry["activations"])
    if isinstance(layer, nn.Conv2d):
        geometry = ConvGeometry(layer)
        geometry.groups = entry.get("groups", geometry.groups)  # fewer where channels were pruned
        return QuantizedConv2d(packed, bias, quantizer, dtype, geometry)
    return QuantizedLinear(packed, bias, quantizer, dtype)


def _empty_quantizer(entry: Mapping[str, Any] | None) -> ActivationQuantizer | None:
    if entry is None:
        return None
    return ActivationQuantizer(QuantSpec(**entry["spec"]), entry["channels"], entry.get("offset", 0))
