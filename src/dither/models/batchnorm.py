"""Batch normalizations and the layers whose outputs they read, found by running the network; and how to fold them.

A normalization is whatever holds a running mean and variance. It belongs to the layer whose output object it is given,
if nothing else reads that output: with the output changed, and the change undone where the normalization reads it, the
network must put out what it did before.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dither.models.layers import as_matrix, given_input, is_conv1d, is_layer, set_weight_matrix
from dither.models.links import same_output
from dither.nn.batchnorm import FoldedNorm
from dither.transforms.batchnorm import ChannelNorm, fold_norm

_SHARED = "not folded: something besides it reads the output of {}"
_ALONE = "not folded: it does not read the output of a layer directly"
_TWICE = "not folded: it or {} runs more than once"
_ODD = "not folded: it does more than normalize"


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalizes by a stored mean and variance for each channel."""
    stored = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return not module.training and all(isinstance(x, Tensor) and x.ndim == 1 for x in stored)


def channel_norm(module: nn.Module) -> ChannelNorm:
    """The affine map of a batch normalization, in float64."""
    mean, variance = (module.get_buffer(key).detach().double() for key in ("running_mean", "running_var"))
    weight, bias = (getattr(module, key, None) for key in ("weight", "bias"))
    return ChannelNorm(
        torch.ones_like(mean) if weight is None else weight.detach().double(),
        torch.zeros_like(mean) if bias is None else bias.detach().double(),
        mean,
        variance,
        float(getattr(module, "eps", 1e-5)),
    )


def fold_batch_norms(model: nn.Module, run: Callable[[], Any]) -> dict[str, str]:
    """Fold every batch normalization that can be, in place; says for each by name what became of it.

    `run` calls the model on a few inputs. The function of the model stays what it was, but for rounding.
    """
    norms = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    if not norms:
        return {}
    with torch.no_grad():
        pairs, remarks = _pairs(model, norms, run)
        before = run()
        if not _alone(model, pairs, run, before):
            sole = {name: layer for name, layer in pairs.items() if _alone(model, {name: layer}, run, before)}
            remarks |= {name: _SHARED.format(layer) for name, layer in pairs.items() if name not in sole}
            pairs = sole
        undo = [_fold(model, name, layer) for name, layer in pairs.items()]
        if not same_output(before, run()):
            for step in reversed(undo):
                step()
            for name, layer in list(pairs.items()):
                step = _fold(model, name, layer)
                if not same_output(before, run()):
                    step()
                    del pairs[name]
                    remarks[name] = _ODD
    return remarks | {name: f"folded into {layer}" for name, layer in pairs.items()}


def _pairs(
    model: nn.Module, norms: Mapping[str, nn.Module], run: Callable[[], Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Each normalization with the layer whose output it is given, and why the others have none."""
    outputs: list[tuple[str, Tensor]] = []
    inputs: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            calls[name] += 1
            outputs.append((name, output))

        return hook

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] += 1
            inputs[name] = given_input(args, kwargs)

        return hook

    layers = {name: module for name, module in model.named_modules() if _foldable(module)}
    handles = [module.register_forward_hook(leave(name)) for name, module in layers.items()]
    handles += [module.register_forward_pre_hook(enter(name), with_kwargs=True) for name, module in norms.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    pairs: dict[str, str] = {}
    remarks: dict[str, str] = {}
    for name in norms:
        layer = next((layer for layer, output in outputs if output is inputs.get(name)), None)
        if layer is None or layers[layer].weight.shape[0] != len(norms[name].get_buffer("running_mean")):
            remarks[name] = _ALONE
        elif calls[name] > 1 or calls[layer] > 1:
            remarks[name] = _TWICE.format(layer)
        else:
            pairs[name] = layer
    return pairs, remarks


def _foldable(module: nn.Module) -> bool:
    """Whether the outputs are the rows of the weight: also a convolution that pads in a way of its own."""
    return (is_layer(module) and not is_conv1d(module)) or isinstance(module, nn.Conv2d)


def _alone(model: nn.Module, pairs: Mapping[str, str], run: Callable[[], Any], before: Any) -> bool:
    """Whether nothing but the normalizations reads the outputs of these layers."""
    with ExitStack() as stack:
        for name, layer in pairs.items():
            stack.enter_context(_changed(model.get_submodule(layer), model.get_submodule(name)))
        return same_output(before, run())


@contextmanager
def _changed(layer: nn.Module, norm: nn.Module):  # type: ignore[no-untyped-def]
    """While open, the layer puts out something else than what the normalization is given."""
    true: list[Tensor] = []

    def change(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        true[:] = [output]
        return output * 1.5 + output.detach().std()

    def undo(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return ((true[0], *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): true[0]})

    handles = [layer.register_forward_hook(change), norm.register_forward_pre_hook(undo, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fold(model: nn.Module, name: str, layer: str) -> Callable[[], None]:
    """Fold one; returns what undoes it."""
    norm, target = model.get_submodule(name), model.get_submodule(layer)
    holder, _, leaf = name.rpartition(".")
    weight, bias = target.get_parameter("weight").detach().clone(), target.bias
    affine = channel_norm(norm)
    before = bias.detach().float() if isinstance(bias, Tensor) else None
    rows, offset = fold_norm(as_matrix(target, weight), before, affine)  # type: ignore[arg-type]
    set_weight_matrix(target, rows, offset)  # type: ignore[arg-type]
    folded = FoldedNorm(norm, layer, affine.bias.float(), affine.weight.abs().float(), affine.scale.float())
    parent = model.get_submodule(holder) if holder else model
    setattr(parent, leaf, folded.eval())

    def undo() -> None:
        target.get_parameter("weight").copy_(weight)
        target.bias = bias
        setattr(parent, leaf, norm)

    return undo


def restore_fold(model: nn.Module, norm: nn.Module, name: str, layer: str) -> None:
    """Turn a normalization of a full-precision skeleton into a folded one, whose layer has a bias to be loaded."""
    if isinstance(norm, FoldedNorm):
        return
    holder, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(holder) if holder else model, leaf, FoldedNorm(norm, layer).eval())
    target = model.get_submodule(layer)
    if getattr(target, "bias", None) is None:
        like = target.get_parameter("weight")
        target.bias = nn.Parameter(like.new_zeros(like.shape[0]), requires_grad=False)


def few(batch: Any, count: int = 2) -> Any:
    """The first samples of a batch of tensors, enough to look at what a network does."""
    if isinstance(batch, Tensor):
        return batch[:count]
    if isinstance(batch, Mapping):
        return {key: few(part, count) for key, part in batch.items()}
    return type(batch)(few(part, count) for part in batch) if isinstance(batch, list | tuple) else batch
