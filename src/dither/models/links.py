"""Norm → layer links and chains of layers, found by changing an output and looking at what arrives.

A norm is linked to the layers whose input is, channel by channel, the norm's own output, and only if nothing else reads
that output: with the change undone at those layers, the block must put out what it did before. So views, rolls and
window partitions are seen through, while paddings, residuals and other readers are noticed, in any architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dither.models.layers import Layer, given_input, is_layer, is_linear, matrix_shape, rows_alike

_ARRIVED = 0.02  # of each value; float16 and bfloat16 round within it, and an output that was not changed is far off
_UNCHANGED = 1e-3  # of each channel; float32 rounding through a block stays near 1e-6, a second reader makes ~0.1
_Inputs = dict[str, list[Tensor]]  # layer → what arrived, call by call


@dataclass(frozen=True)
class Link:
    """A normalization and the layers that read nothing but its output; names are relative to the block."""

    norm: str
    layers: tuple[str, ...]


@dataclass
class Links:
    """The links of a block, and for every other norm why it has none."""

    found: list[Link] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """A linear layer and those that read its output channel by channel, whatever else multiplies it (a gate, say)."""

    source: str
    layers: tuple[str, ...]


def find_links(block: nn.Module, run: Callable[[], Any]) -> Links:
    """Probe each norm of the block; `run` calls the block on one batch and returns its output."""
    norms = {name: m for name, m in block.named_modules() if _is_channel_norm(m)}
    probes = {name: _Altered(norm, *_change(norm.get_parameter("weight"), name)) for name, norm in norms.items()}
    found, refused = _follow(block, probes, run)
    return Links([Link(*one) for one in found.items()], refused)


def find_chains(block: nn.Module, run: Callable[[], Any]) -> list[Chain]:
    """Probe each linear layer whose output is as wide as some layer's input, by scaling its channels.

    Values behind attention weights and what a gate or ReLU lets through arrive scaled; behind another activation or
    a residual connection they do not.
    """
    linear = {name: m for name, m in block.named_modules() if is_linear(m)}
    widths = {matrix_shape(layer)[1] for layer in linear.values()}
    probes = {}
    for name, layer in linear.items():
        if (rows := matrix_shape(layer)[0]) in widths:
            scale, shift = _change(layer.weight.new_empty(rows), name)
            probes[name] = _Altered(layer, scale, torch.zeros_like(shift))
    return [Chain(*one) for one in _follow(block, probes, run)[0].items()]


def _follow(
    block: nn.Module, probes: Mapping[str, "_Altered"], run: Callable[[], Any]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """For each probe the layers that read what it changes, and nothing else does; for the others why not."""
    found: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    if not probes:
        return found, refused
    layers = {name: module for name, module in block.named_modules() if is_layer(module)}
    before, output = _inputs(layers, run)
    for name, altered in probes.items():
        with altered:
            after, _ = _inputs(layers, run)
        if not altered.applied:
            refused[name] = "its channels are not on the last axis"
            continue
        linear = [key for key in after if key in before and is_linear(layers[key])]
        readers = [key for key in linear if _arrives(before[key], after[key], altered.scale, altered.shift)]
        if not readers:
            refused[name] = "no layer reads its output channel by channel"
        elif same_output(output, _run_undone(altered, [layers[key] for key in readers], run)):
            found[name] = tuple(readers)
        else:
            refused[name] = "something besides the layers " + ", ".join(readers) + " reads its output"
    return found, refused


def shared_inputs(layers: Mapping[str, Layer], run: Callable[[], Any]) -> list[tuple[str, ...]]:
    """Groups of two or more layers that multiply the same rows of inputs (q, k, v; gate, up), in execution order."""
    inputs, _ = _inputs(layers, run)
    groups: list[list[str]] = []
    for name in inputs:
        home = next((group for group in groups if _same_rows(layers, inputs, group[0], name)), None)
        groups.append([name]) if home is None else home.append(name)
    return [tuple(group) for group in groups if len(group) > 1]


def same_output(before: Any, after: Any) -> bool:
    """Whether two outputs of a block (their first tensors) differ by no more than rounding.

    Each channel counts by its own size: beside the huge channels that some networks have, a real change looks small.
    """
    old, new = (torch.atleast_1d(first_tensor(output).detach()) for output in (before, after))
    rows, changed = (x.float().reshape(-1, x.shape[-1]) for x in (old, new))
    size, error = rows.norm(dim=0), (changed - rows).norm(dim=0)
    size = size.clamp_min(_UNCHANGED * float(size.median())).clamp_min(torch.finfo(torch.float32).tiny)
    return bool((error <= max(_UNCHANGED, 8 * torch.finfo(old.dtype).eps) * size).all())


def _same_rows(layers: Mapping[str, Layer], inputs: _Inputs, one: str, two: str) -> bool:
    if not rows_alike(layers[one], layers[two]) or len(inputs[one]) != len(inputs[two]):
        return False
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(inputs[one], inputs[two], strict=True))


def _is_channel_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    # a frozen norm holds its weight as a buffer, and scales maps, whose channels are not on the last axis
    return leaf and not is_layer(module) and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _change(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A scale and a shift for as many channels as the vector has."""
    generator = torch.Generator().manual_seed(len(name) + weight.shape[0])
    draw = torch.rand(2, weight.shape[0], generator=generator).to(weight.device, torch.float32) - 0.5
    return 1 + draw[0] / 2, draw[1]


def _inputs(
    layers: Mapping[str, nn.Module], run: Callable[[], Any], changing: frozenset[str] = frozenset()
) -> tuple[_Inputs, Any]:
    """What arrives at each layer, and what `run` returns; inputs that are changed in place later are copied."""
    seen: _Inputs = {}
    versions: list[tuple[str, Tensor, int]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = given_input(args, kwargs).detach()
            seen.setdefault(name, []).append(x.clone() if name in changing else x)
            versions.append((name, x, x._version))

        return hook

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in layers.items()]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    late = {name for name, x, version in versions if x._version != version} - changing
    return _inputs(layers, run, changing | late) if late else (seen, output)


class _Altered:
    """While open, the output of a module is multiplied by `scale` and shifted, if its last axis holds the channels."""

    def __init__(self, norm: nn.Module, scale: Tensor, shift: Tensor) -> None:
        self.norm, self.scale, self.shift, self.applied = norm, scale, shift, False

    def __enter__(self) -> None:
        self.handle = self.norm.register_forward_hook(self._change)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _change(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.applied = output.shape[-1] == self.scale.shape[0]
        return (output * self.scale + self.shift).to(output.dtype) if self.applied else output


def _arrives(before: list[Tensor], after: list[Tensor], scale: Tensor, shift: Tensor) -> bool:
    """Whether every value at every call is the changed one; value by value, so that the zeros of a padding count."""
    if [x.shape for x in before] != [x.shape for x in after] or before[0].shape[-1:] != scale.shape:
        return False
    near = ((old.abs() * scale + shift.abs()) * _ARRIVED for old in before)
    errors = ((old * scale + shift - new).abs() for old, new in zip(before, after, strict=True))
    return all(bool((error <= limit).all()) for error, limit in zip(errors, near, strict=True))


def _run_undone(altered: _Altered, readers: list[nn.Module], run: Callable[[], Any]) -> Any:
    def undo(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        x = given_input(args, kwargs)
        undone = ((x - altered.shift) / altered.scale).to(x.dtype)
        return ((undone, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): undone})

    handles = [reader.register_forward_pre_hook(undo, with_kwargs=True) for reader in readers]
    try:
        with altered:
            return run()
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output of any nesting."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output
