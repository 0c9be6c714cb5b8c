"""Products of the loss's Hessian with directions in weight space, by two backward passes.

All layers at once: one product with a direction over all layers gives every layer's part of it. Attention falls back
on the plain formula meanwhile, as the fused kernels have no second derivative.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dither.errors import InputError, NonFiniteError
from dither.models.gradients import NOT_RESIDENT, Gradients, leaves_of, rows_of
from dither.models.layers import Layer, given_input, is_layer
from dither.statistics.hutchinson import rademacher


def hessian_product(gradients: Gradients, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """H d of the mean loss over all samples, for a direction d given layer by layer in the shapes of the weights.

    Batch normalization must be in evaluation mode (samples would be coupled), as a network that was opened is.

    Raises:
        InputError: weights that are not all in memory, or not in single precision or wider.
        NonFiniteError: NaN or Inf in a product; the message names the layer.
    """
    if not gradients.resident:
        raise InputError(NOT_RESIDENT)
    layers = {name: _layer(gradients.model, name) for name in directions}
    total = {name: torch.zeros_like(direction) for name, direction in directions.items()}
    with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]), leaves_of(layers, gradients.model) as leaves:
        weights, along = [leaves[name] for name in directions], list(directions.values())
        for batch in gradients.batches:
            loss = gradients.loss(batch, gradients.run(batch))
            first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * d).sum() for g, d in zip(first, along, strict=True)]).sum()
            second = torch.autograd.grad(slope, weights, materialize_grads=True)
            share = rows_of(batch) / gradients.count
            for name, part in zip(directions, second, strict=True):
                total[name] += share * part
            del loss, first, slope, second  # two graphs at once would double the memory
    for name, product in total.items():
        if not bool(torch.isfinite(product).all()):
            raise NonFiniteError(
                f"the second derivative for {name}.weight holds NaN or Inf; try fewer or other samples"
            )
    return total


def input_traces(gradients: Gradients, layers: Sequence[str], seed: int) -> dict[str, tuple[float, float]]:
    """A draw of the mean over samples of Tr(∂²f(x)/∂a²) for the input a of each layer, and how many numbers a has.

    Samples do not touch each other's loss, so one draw over a batch adds up its samples' traces. Only the layer's own
    use of its input counts, not what else reads the tensor.
    """
    if not gradients.resident:
        raise InputError(NOT_RESIDENT)
    generator = torch.Generator().manual_seed(seed)
    traces, sizes = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    asking = [p for p in gradients.model.parameters() if p.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
            for batch in gradients.batches:
                for name, (trace, size) in _batch_traces(gradients, layers, batch, generator).items():
                    traces[name] += trace / gradients.count
                    sizes[name] += size / gradients.count
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
    return {name: (traces[name], sizes[name]) for name in layers}


def _batch_traces(
    gradients: Gradients, layers: Sequence[str], batch: Any, generator: torch.Generator
) -> dict[str, tuple[float, float]]:
    """Sums over a batch's samples."""
    added: list[tuple[str, Tensor]] = []

    def shift(name: str) -> Callable[..., tuple[Any, ...]]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            x = given_input(args, kwargs)
            zero = torch.zeros_like(x, requires_grad=True)  # its Hessian is that of x at this place alone
            added.append((name, zero))
            return ((x + zero, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): x + zero})

        return hook

    handles = [_layer(gradients.model, n).register_forward_pre_hook(shift(n), with_kwargs=True) for n in layers]
    try:
        loss = gradients.loss(batch, gradients.run(batch)) * rows_of(batch)
    finally:
        for handle in handles:
            handle.remove()
    zeros = [zero for _, zero in added]
    first = torch.autograd.grad(loss, zeros, create_graph=True, materialize_grads=True)
    along = [rademacher(zero.shape, generator).to(zero) for zero in zeros]
    slope = torch.stack([(g * d).sum() for g, d in zip(first, along, strict=True)]).sum()
    second = torch.autograd.grad(slope, zeros, materialize_grads=True)
    found = dict.fromkeys(layers, (0.0, 0.0))
    for (name, zero), direction, part in zip(added, along, second, strict=True):
        trace, size = found[name]
        found[name] = trace + float((direction * part).double().sum()), size + zero.numel()
    return found


def _layer(model: nn.Module, name: str) -> Layer:
    layer = model.get_submodule(name)
    if not is_layer(layer):
        raise TypeError(f"{name} is a {type(layer).__name__}, not a layer in full precision")
    if layer.weight.dtype not in (torch.float32, torch.float64):
        raise InputError(f"second derivatives overflow in {layer.weight.dtype}; load the model in float32")
    return layer
