"""Chains of layers whose channels pass from one to the next one by one, found by changing channels and looking.

A chain is a convolution, the depthwise convolutions that its channels run through, and the layers that mix them again.
It is one only if every channel arrives at its own place and no other, if nothing else reads the channels (with what the
readers see restored, the network puts out what it did), and if nothing else writes them (with the source's output held,
other inputs of the network change nothing at the readers). So residual streams and gates are noticed anywhere.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dither.models.layers import given_input, is_layer, is_linear
from dither.models.links import same_output

_SAME = 1e-5  # of the largest value: other blocking of the same sums
_NODES = 64  # measured: the mean of a ReLU of a normal variable within 0.5 %


@dataclass(frozen=True)
class ChannelChain:
    """`source`'s output channels run through depthwise layers `through`, and only `readers` mix them."""

    source: str
    through: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def last(self) -> str:
        """The layer behind which the channels are read."""
        return self.through[-1] if self.through else self.source


def is_depthwise(layer: nn.Module) -> bool:
    """Whether every channel has one filter of its own."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def find_channel_chains(
    model: nn.Module, run: Callable[[], Any], run_other: Callable[[], Any]
) -> tuple[list[ChannelChain], dict[str, str]]:
    """All chains in execution order, and for every other convolution why it starts none.

    `run` calls the model on some inputs, `run_other` on as many others.
    """
    layers = {name: module for name, module in model.named_modules() if is_layer(module) or _holds_values(module)}
    before, output = _inputs(layers, run)
    chains: list[ChannelChain] = []
    refused: dict[str, str] = {}
    for name in before:
        layer = layers[name]
        if not isinstance(layer, nn.Conv2d) or layer.groups > 1:
            continue
        found = _chain(name, layers, before, output, run, run_other)
        if isinstance(found, str):
            refused[name] = found
        else:
            chains.append(found)
    return chains, refused


def _holds_values(module: nn.Module) -> bool:
    """Whether a module, such as a normalization that was not folded, has tensors of its own to be cut with the rest."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.ndim > 0 for tensor in own)


def _chain(
    name: str,
    layers: Mapping[str, nn.Module],
    before: Mapping[str, Tensor],
    output: Any,
    run: Callable[[], Any],
    run_other: Callable[[], Any],
) -> ChannelChain | str:
    source = layers[name]
    channels = source.get_parameter("weight").shape[0]
    generator = torch.Generator().manual_seed(channels)
    chosen = torch.randperm(channels, generator=generator) < (channels + 1) // 2
    reached = set(before)
    for mask in (chosen, ~chosen):
        with _changed(source, mask):
            after, _ = _inputs(layers, run)
        moved = {key: _moved(before[key], x) for key, x in after.items() if key in before}
        reached &= {key for key, which in moved.items() if len(which) == channels and _only(which, mask)}
    holder = next((key for key in before if key in reached and not is_layer(layers[key])), None)
    if holder is not None:
        return f"not pruned: {holder} ({type(layers[holder]).__name__}) holds a value for each of its channels"
    through = tuple(key for key in before if key in reached and is_depthwise(layers[key]))
    readers = tuple(key for key in before if key in reached and key not in through)
    if not readers:
        return "not pruned: no layer reads its channels one by one"
    if any(isinstance(layer := layers[key], nn.Conv2d) and layer.groups > 1 for key in readers):
        return f"not pruned: its reader {readers[0]} is grouped"
    with ExitStack() as stack:
        stack.enter_context(_changed(source, torch.ones_like(chosen)))
        for key in readers:
            stack.enter_context(_given(layers[key], before[key]))
        if not same_output(output, run()):
            return "not pruned: something besides " + ", ".join(readers) + " reads its output"
    if not _sole(source, readers, layers, before, run, run_other):
        return "not pruned: something besides it writes the same channels (a residual connection)"
    return ChannelChain(name, through, readers)


def _sole(
    source: nn.Module,
    readers: tuple[str, ...],
    layers: Mapping[str, nn.Module],
    before: Mapping[str, Tensor],
    run: Callable[[], Any],
    run_other: Callable[[], Any],
) -> bool:
    """Whether what the readers see follows from the source's output alone."""
    held: list[Tensor] = []
    handle = source.register_forward_hook(lambda _module, _args, output: held.append(output.clone()))
    try:
        run()
    finally:
        handle.remove()
    handle = source.register_forward_hook(lambda _module, _args, _output: held[0].clone())
    try:
        seen, _ = _inputs({key: layers[key] for key in readers}, run_other)
    finally:
        handle.remove()
    return all(_none(_moved(before[key], seen[key]), slice(None)) for key in readers)


def _inputs(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    """The input of each layer that is called once, and what `run` returns."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen.setdefault(name, []).append(
            given_input(args, kwargs).detach().clone()  # an activation in place may change it later
        )

    handles = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: given[0] for name, given in seen.items() if len(given) == 1}, output


def _moved(before: Tensor, after: Tensor) -> Bool[Tensor, " c"]:
    """Which channels (axis 1 of pictures, the last of rows) differ; none to tell where shapes do."""
    if before.shape != after.shape:
        return torch.zeros(0, dtype=torch.bool)
    axis = 1 if before.ndim == 4 else before.ndim - 1
    size = float(before.abs().max())
    difference = (after - before).abs().movedim(axis, 0).flatten(1)
    return (difference.amax(dim=1) > _SAME * size).cpu()


def _only(which: Bool[Tensor, " c"], mask: Bool[Tensor, " c"]) -> bool:
    return bool(which.any()) and _none(which, ~mask)


def _none(which: Bool[Tensor, " c"], mask: Any) -> bool:
    return not bool(which[mask].any())


@contextmanager
def _changed(layer: nn.Module, mask: Bool[Tensor, " c"]):  # type: ignore[no-untyped-def]
    """While open, the chosen channels of a convolution's output are others."""

    def change(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        other = output.flip(-1) * 0.5 + output.std()
        return torch.where(mask.to(output.device).view(1, -1, 1, 1), other, output)

    handle = layer.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _given(layer: nn.Module, x: Tensor):  # type: ignore[no-untyped-def]
    """While open, a layer reads `x`, whatever it is called with."""

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return ((x, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): x})

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _EnoughError(Exception):
    """The input that was waited for has arrived."""


def expected_inputs(
    model: nn.Module,
    run: Callable[[int], Any],
    last: str,
    reader: str,
    mean: Float[Tensor, " c"],
    deviation: Float[Tensor, " c"],
) -> Float[Tensor, " c"]:
    """E[f(z)] of each channel at a reader, for z normal with these moments at the output of `last`.

    f is whatever the network does in between, an activation say; it is asked for its value at quantiles of z, so none
    has to be known. `run(n)` calls the model on n inputs.
    """
    normal = NormalDist()
    nodes = torch.tensor([normal.inv_cdf((k + 0.5) / _NODES) for k in range(_NODES)])
    values = mean.cpu() + deviation.cpu() * nodes[:, None]
    seen: list[Tensor] = []

    def set_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return values.to(output)[:, :, None, None].expand_as(output).clone()  # an activation may work in place

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(given_input(args, kwargs))
        raise _EnoughError

    handles = [
        model.get_submodule(last).register_forward_hook(set_output),
        model.get_submodule(reader).register_forward_pre_hook(keep, with_kwargs=True),
    ]
    try:
        run(_NODES)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    x = seen[0]
    rows: Tensor = x.flatten(0, -2) if is_linear(model.get_submodule(reader)) else x.mean(dim=(2, 3))
    return rows.mean(dim=0).float()
