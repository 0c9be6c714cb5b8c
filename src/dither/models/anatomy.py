"""What a network is made of, found by running it once: units, layers, attention, and a reason for all that is kept.

A *unit* is what the walk visits: a repeated block, or a layer outside of blocks (patch embedding, classifier). Blocks
are the innermost same-class children of a list that hold a normalization and at least two layers: this finds
transformer and convolution blocks without knowing architectures, and passes over lists of experts or branches.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dither.errors import DitherError, InputError
from dither.models.layers import is_layer
from dither.nn.attention import OperandMode
from dither.nn.experts import everyone_called
from dither.nn.linear import QuantizedConv2d, QuantizedLinear

HEAD = "the head over the vocabulary stays in full precision; an override of this name quantizes it"


@dataclass(frozen=True)
class Unit:
    """A part of the network that is quantized in one go; names are full module names."""

    name: str
    is_block: bool
    layers: tuple[str, ...]  # in execution order
    attention: tuple[str, ...]  # modules that multiply activations by activations


@dataclass(frozen=True)
class Anatomy:
    """Units in execution order, which layer reads the network's input, and why the rest is kept."""

    units: tuple[Unit, ...]
    entry: str
    kept: dict[str, str]

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers of all units, in execution order."""
        return tuple(name for unit in self.units for name in unit.layers)


def read_anatomy(model: nn.Module, run: Callable[[], object], wanted: Collection[str] = ()) -> Anatomy:
    """Run the model once (`run`) and tell what it is made of.

    A layer that shares its weight with a table of embeddings is kept, unless it is `wanted` by name.

    Raises:
        InputError: it holds no layer that dither can quantize, or cannot be run.
    """
    try:
        trace = _trace(model, run)
    except DitherError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        where = f"{type(model).__name__} fails on the first calibration batch"
        raise InputError(f"{where}: {error}; give it inputs as it expects") from error
    names = {name: module for name, module in model.named_modules() if is_layer(module)}
    if not names and any(isinstance(module, QuantizedLinear | QuantizedConv2d) for module in model.modules()):
        raise InputError(f"{type(model).__name__} is quantized already; give the model that it was made from")
    if not names:
        raise InputError(f"{type(model).__name__} has no Linear or Conv2d layer: there is nothing to quantize")
    kept = {name: _uncalled(model, name) for name in names if trace.calls[name] == 0}
    heads = {name: HEAD for name, module in names.items() if module is _head(model)} | _tied(model)
    kept |= {name: reason for name, reason in heads.items() if name not in wanted}
    blocks = [name for name in block_names(model) if trace.calls[name] > 0]
    for block in [name for name in blocks if trace.calls[name] > 1]:
        blocks.remove(block)
        reason = f"its block {block} runs {trace.calls[block]} times in one forward pass (shared weights)"
        kept |= {name: reason for name in names if _inside(name, block)}
    units: dict[str, list[str]] = {}
    for name in (name for name in trace.order if name in names and name not in kept):
        block_name = next((block for block in blocks if _inside(name, block)), name)
        if block_name == name and trace.calls[name] > 1:
            kept[name] = f"runs {trace.calls[name]} times in one forward pass outside of a block"
            continue
        units.setdefault(block_name, []).append(name)
    built = tuple(_unit(name, layers, name in blocks, trace.attention) for name, layers in units.items())
    entry = built[0].layers[0] if built else ""
    return Anatomy(built, entry, kept)


def _uncalled(model: nn.Module, name: str) -> str:
    """Why a layer is kept that the forward pass does not call."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight without calling it"
    return "never called in the forward pass"


def _tied(model: nn.Module) -> dict[str, str]:
    """Layers that multiply by a table of embeddings; codes of their own would only add to what is stored."""
    tables = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    return {
        name: f"its weight is that of {tables[id(layer.weight)]}; an override of this name quantizes it apart"
        for name, layer in layers.items()
        if id(layer.weight) in tables
    }


def _head(model: nn.Module) -> nn.Module | None:
    """A language model's last layer, whose weight often is the table of embeddings too."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if callable(find) else None
    except (NotImplementedError, AttributeError):  # classes that have none say so in these ways
        return None
    return head if isinstance(head, nn.Module) else None


def _unit(name: str, layers: list[str], is_block: bool, attention: list[str]) -> Unit:
    return Unit(name, is_block, tuple(layers), tuple(owner for owner in attention if is_block and _inside(owner, name)))


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


@dataclass
class _Trace:
    calls: Counter[str]
    order: list[str]  # first calls
    attention: list[str]


def _trace(model: nn.Module, run: Callable[[], object]) -> _Trace:
    trace, stack = _Trace(Counter(), [], []), list[str]()
    handles: list[RemovableHandle] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            stack.append(name)
            if not trace.calls[name]:
                trace.order.append(name)
            trace.calls[name] += 1

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    def operand(kind: str, x: torch.Tensor) -> torch.Tensor:
        if kind == "query" and stack and stack[-1] not in trace.attention:
            trace.attention.append(stack[-1])
        return x

    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        with torch.no_grad(), OperandMode(operand), everyone_called(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return trace


def block_names(model: nn.Module) -> list[str]:
    """Innermost same-class list children that hold a normalization and at least two layers."""
    found = [name for name in _list_children(model) if _is_block(model.get_submodule(name))]
    return [name for name in found if not any(other != name and _inside(other, name) for other in found)]


def _list_children(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            classes = {type(child) for child in module.children()}
            if len(classes) == 1 and not any(is_layer(child) for child in module.children()):
                yield from (f"{name}.{key}" if name else key for key, _ in module.named_children())


def _is_block(module: nn.Module) -> bool:
    below = list(module.modules())
    return sum(is_layer(child) for child in below) > 1 and any(
        "norm" in type(child).__name__.lower() for child in below
    )
