"""What each output value of a layer weighs in the loss: squared gradients at some rows, beside the rows of inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dither.draws import generator_of
from dither.errors import InputError, NonFiniteError
from dither.models.gradients import HALF_SCALE, NOT_RESIDENT, Gradients, leaves_of
from dither.models.layers import given_input, has_gram, input_rows
from dither.models.losses import Loss
from dither.statistics.output_rows import OutputRows


def output_rows(gradients: Gradients, layers: Sequence[str], rows: int, loss: Loss) -> dict[str, OutputRows]:
    """At least `rows` rows of each layer, spread evenly over all samples; one pass a sample over the whole network.

    Which rows of a sample are taken depends on the layer's name and the sample's number alone. Layers that no sample
    reaches, and grouped convolutions, are left out.

    Raises:
        InputError: the weights are not all in memory, or the model returns no logits.
        NonFiniteError: NaN or Inf in a weight, an input or a gradient; the message names the layer.
    """
    if not gradients.resident:
        raise InputError(NOT_RESIDENT)
    for name in layers:
        gradients.weight(name)  # refuses NaN and Inf
    modules = {name: gradients.layer(name) for name in layers if has_gram(gradients.layer(name))}
    each, found = -(-rows // max(gradients.count, 1)), dict[str, OutputRows]()
    for number, sample in enumerate(gradients.samples(), start=1):
        for name, parts in _of_sample(gradients, modules, sample, loss).items():
            generator = generator_of(f"{name} {number}")
            for x, gradient in parts:
                one = _rows(name, modules[name], x, gradient, each, generator)
                found[name] = found[name].merge(one) if name in found else one
        if gradients.progress is not None:
            gradients.progress("gradients", number, gradients.count)
    return found


def _of_sample(
    gradients: Gradients, modules: dict[str, Any], sample: Any, loss: Loss
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Input and output gradient of each call of each layer."""
    calls: list[tuple[str, Tensor, list[Tensor]]] = []

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            leaf = not output.requires_grad
            arrived: list[Tensor] = []
            (output.requires_grad_() if leaf else output).register_hook(arrived.append)
            calls.append((name, given_input(args, kwargs).detach().clone(), arrived))
            return output + 0 if leaf else output  # what follows may change it in place, which a leaf forbids

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with torch.enable_grad(), leaves_of({}, gradients.model):
            value = loss(sample, gradients.run(sample))
            half = any(parameter.dtype == torch.float16 for parameter in gradients.model.parameters())
            if not bool(value.isfinite()):
                gradients.blame(sample, list(modules))
            if value.requires_grad:  # else it depends on no layer
                (value * (HALF_SCALE if half else 1.0)).backward()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, x, arrived in calls:
        if arrived:  # an output that the loss does not depend on has no gradient
            found.setdefault(name, []).append((x, arrived[0]))
    return found


def _rows(name: str, layer: Any, x: Tensor, gradient: Tensor, rows: int, generator: torch.Generator) -> OutputRows:
    if not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError(f"the gradient of the output of {name} holds NaN or Inf; try the model in float32")
    wide = gradient.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else gradient
    try:
        return OutputRows.of(input_rows(layer, x), wide, rows, generator)
    except NonFiniteError as error:
        raise NonFiniteError(f"input of {name}: {error}") from None
