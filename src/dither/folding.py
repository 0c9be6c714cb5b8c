"""Folding a change of an activation into the modules around it, undone where the block's output does not stay."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.models.layers import Layer, is_conv1d, set_weight_matrix, weight_matrix
from dither.models.links import Chain, Link, same_output
from dither.transforms.equalize import equalization, fold_into_rows
from dither.transforms.reparameterize import Fold, fold_into_linear, fold_into_norm
from dither.walk import Block


def fold_link(block: Block, link: Link, change: Fold) -> bool:
    """Fold a change of a norm's output into the norm and its layers; False if that had to be undone."""

    def fold(network: nn.Module) -> None:
        norm = network.get_submodule(block.local(link.norm))
        old = norm.get_parameter("weight")
        weight, bias = fold_into_norm(old.detach().float(), bias_of(norm), change)
        with torch.no_grad():
            old.copy_(weight)
        if bias is not None:
            norm.bias = nn.Parameter(bias.to(old.dtype), requires_grad=False)
        _fold_into_layers(block, network, link.layers, change)

    return _unless_changed(block, (link.norm, *link.layers), fold)


def fold_chain(block: Block, chain: Chain, scale: Float[Tensor, " d"]) -> bool:
    """Divide a layer's output by `scale`, and multiply the columns of those that read it; False if that was undone."""

    def fold(network: nn.Module) -> None:
        source = network.get_submodule(block.local(chain.source))
        rows, bias = fold_into_rows(weight_matrix(source, chain.source), bias_of(source), scale)  # type: ignore[arg-type]
        set_weight_matrix(source, rows, bias)  # type: ignore[arg-type]
        _fold_into_layers(block, network, chain.layers, equalization(scale))

    return _unless_changed(block, (chain.source, *chain.layers), fold)


def _fold_into_layers(block: Block, network: nn.Module, names: tuple[str, ...], change: Fold) -> None:
    for name in names:
        layer = network.get_submodule(block.local(name))
        folded, bias = fold_into_linear(weight_matrix(layer, name), bias_of(layer), change)  # type: ignore[arg-type]
        set_weight_matrix(layer, folded, bias)  # type: ignore[arg-type]


def _unless_changed(block: Block, names: tuple[str, ...], fold: Callable[[nn.Module], None]) -> bool:
    before = block.once()
    networks = (block.reference, block.module)
    undo = [_restore(network.get_submodule(block.local(name))) for network in networks for name in names]
    for network in networks:
        fold(network)
    if block.team.agree(lambda: same_output(before, block.once())):
        return True
    for step in undo:
        step()
    return False


def _restore(module: nn.Module) -> Callable[[], None]:
    weight, bias = module.get_parameter("weight").detach().clone(), getattr(module, "bias", None)
    kept = None if bias is None else bias.detach().clone()

    def restore() -> None:
        module.get_parameter("weight").data.copy_(weight)
        module.register_parameter("bias", None if kept is None else nn.Parameter(kept, requires_grad=False))

    return restore


@contextmanager
def on_trial(block: Block, weights: Mapping[str, Float[Tensor, "o i"]]) -> Iterator[None]:
    """While open, layers of the full-precision block compute with these weights."""
    layers = {name: block.layer(name) for name in weights}
    undo = [_restore(layer) for layer in layers.values()]
    try:
        for name, layer in layers.items():
            set_weight_matrix(layer, weights[name], None)
        yield
    finally:
        for step in undo:
            step()


@contextmanager
def replaced_weight(layer: Layer, weight: Float[Tensor, "o i"]) -> Iterator[None]:
    """While open, the layer multiplies by this matrix; its own parameter, which others may share, is not written to."""
    own = layer.weight
    matrix = weight.T if is_conv1d(layer) else weight.reshape(own.shape)
    layer.weight = nn.Parameter(matrix.to(own), requires_grad=False)
    try:
        yield
    finally:
        layer.weight = own


def bias_of(module: nn.Module) -> Float[Tensor, " o"] | None:
    """The bias in float32, None where there is none."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach().float()
