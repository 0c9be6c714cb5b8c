"""Norm → layer links, found by changing a norm's output and looking at what arrives.

A norm is linked to the layers whose input is, channel by channel, the norm's own output, and only if nothing else reads
that output: with the change undone at those layers, the block must put out what it did before. So views, rolls and
window partitions are seen through, while paddings, residuals and other readers are noticed, in any architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dither.models.layers import is_layer

_TOLERANCE = 1e-3  # float32 rounding through a block stays near 1e-6; a second reader changes the output by ~0.1


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


def find_links(block: nn.Module, run: Callable[[], Any]) -> Links:
    """Probe each norm of the block; `run` calls the block on one batch and returns its output."""
    links, layers = Links(), {name: module for name, module in block.named_modules() if is_layer(module)}
    norms = {name: m for name, m in block.named_modules() if _is_channel_norm(m)}
    if not norms:
        return links
    before, output = _inputs(layers, run)
    for name, norm in norms.items():
        scale, shift = _change(norm, name)
        altered = _Altered(norm, scale, shift)
        with altered:
            after, _ = _inputs(layers, run)
        if not altered.applied:
            links.refused[name] = "its channels are not on the last axis"
            continue
        readers = [key for key, x in after.items() if key in before and _arrives(before[key], x, scale, shift)]
        if not readers:
            links.refused[name] = "no layer reads its output channel by channel"
            continue
        undone = _run_undone(norm, [layers[key] for key in readers], scale, shift, run)
        if _relative(_first_tensor(output), _first_tensor(undone)) > _TOLERANCE:
            links.refused[name] = "something besides the layers " + ", ".join(readers) + " reads its output"
        else:
            links.found.append(Link(name, tuple(readers)))
    return links


def shared_inputs(layers: dict[str, nn.Module], run: Callable[[], Any]) -> list[tuple[str, ...]]:
    """Groups of two or more layers that read the same input (q, k, v; gate, up), in execution order."""
    inputs, _ = _inputs(layers, run)
    groups: list[list[str]] = []
    for name, x in inputs.items():
        home = next((group for group in groups if _same(inputs[group[0]], x)), None)
        groups.append([name]) if home is None else home.append(name)
    return [tuple(group) for group in groups if len(group) > 1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _is_channel_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    return leaf and not is_layer(module) and isinstance(weight, Tensor) and weight.ndim == 1


def _change(norm: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    weight = norm.get_parameter("weight")
    generator = torch.Generator().manual_seed(len(name) + weight.shape[0])
    draw = torch.rand(2, weight.shape[0], generator=generator).to(weight.device, torch.float32) - 0.5
    return 1 + draw[0] / 2, draw[1]


def _inputs(layers: dict[str, nn.Module], run: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, args[0].detach())

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    try:
        return seen, run()
    finally:
        for handle in handles:
            handle.remove()


class _Altered:
    """While open, the output of a norm is multiplied by `scale` and shifted, if its last axis holds the channels."""

    def __init__(self, norm: nn.Module, scale: Tensor, shift: Tensor) -> None:
        self.norm, self.scale, self.shift, self.applied = norm, scale, shift, False

    def __enter__(self) -> None:
        self.handle = self.norm.register_forward_hook(self._change)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _change(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.applied = output.shape[-1] == self.scale.shape[0]
        return output * self.scale + self.shift if self.applied else output


def _arrives(before: Tensor, after: Tensor, scale: Tensor, shift: Tensor) -> bool:
    if before.shape != after.shape or before.shape[-1] != scale.shape[0]:
        return False
    return _relative(before * scale + shift, after) < _TOLERANCE


def _run_undone(norm: nn.Module, readers: list[nn.Module], scale: Tensor, shift: Tensor, run: Callable[[], Any]) -> Any:
    handles = [m.register_forward_pre_hook(lambda _m, a: ((a[0] - shift) / scale, *a[1:])) for m in readers]
    try:
        with _Altered(norm, scale, shift):
            return run()
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _relative(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).abs().amax() / reference.abs().amax().clamp_min(1e-12))
