"""Squared gradient of each output times its squared error: one backward pass scores all options of all layers.

s = Σ (∂L/∂Y)² (Y_q - Y)² over the outputs Y of a layer, a diagonal Fisher approximation of what the error adds to the
loss. Every option costs a local forward pass.

Source: NVIDIA ModelOpt 0.4x, `auto_quantize` with method "gradient" (its formula; no code is copied).
Departs from it: gradients are of each sample's own loss, so that batches of any size give the same; standard errors
over batches; experts are measured at their own outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.errors import InputError, NonFiniteError
from dither.folding import replaced_weight
from dither.formats.qtensor import QTensor
from dither.models.gradients import NOT_RESIDENT, Gradients, rows_of
from dither.models.layers import given_input
from dither.sensitivities.base import Measured, Probe, rounded
from dither.sensitivities.swap import Quantizers, fit_inputs, quantizer_of

Rows = dict[str, list[float]]  # layer → a number for each option


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher of layer outputs."""

    name: ClassVar[str] = "fisher"
    about: ClassVar[str] = "squared output gradient times squared output error (ModelOpt); one backward pass"

    def measure(self, probe: Probe) -> Measured:
        """The sum over each unit's layers, as a mean over samples."""
        if probe.network.weights is not None:
            raise InputError(f"fisher: {NOT_RESIDENT}")
        stored, quantizers = _stored(probe), fit_inputs(probe)
        gradients, parts = probe.gradients(), list[tuple[int, Float[np.ndarray, "u p"]]]()
        for index, batch in enumerate(probe.batches):
            rows = probe.kept(f"batch {index}", partial(_batch, probe, gradients, batch, stored, quantizers))
            parts.append((rows_of(batch), probe.table(probe.by_unit(rows))))
            probe.say("fisher", index + 1, len(probe.batches))
        samples = sum(count for count, _ in parts)
        scores = np.sum([part for _, part in parts], axis=0) / samples
        return Measured(scores, _errors(parts))


def _errors(parts: list[tuple[int, Float[np.ndarray, "u p"]]]) -> Float[np.ndarray, "u p"] | None:
    """Standard errors of the mean over batches; None of a single one."""
    if len(parts) < 2:
        return None
    means = np.stack([np.where(np.isfinite(part), part, 0.0) / count for count, part in parts])
    found: Float[np.ndarray, "u p"] = means.std(axis=0, ddof=1) / len(parts) ** 0.5
    return found


def _stored(probe: Probe) -> dict[tuple[str, int], QTensor]:
    """Every layer's codes as every option, a byte a weight; dequantized whenever they are needed."""
    found = {}
    for number, unit in enumerate(probe.units):
        for name in unit.layers:
            for place in probe.can(number):
                if (spec := probe.options[place].weights) is not None:
                    found[name, place] = rounded(probe.weight(name), spec)
        probe.say("rounding", number + 1, len(probe.units))
    return found


def _batch(
    probe: Probe, gradients: Gradients, batch: Any, stored: dict[tuple[str, int], QTensor], quantizers: Quantizers
) -> Rows:
    """Σ g² ΔY² of each layer and option over a batch's samples."""
    rows: Rows = {name: [0.0] * len(probe.options) for name in probe.layers}

    def arrived(name: str, x: Tensor, y: Tensor) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def take(gradient: Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(f"the gradient of the output of {name} holds NaN or Inf")
            for place, option in enumerate(probe.options):
                codes, inputs = stored.get((name, place)), quantizer_of(quantizers, name, option.activations)
                if codes is None and inputs is None:
                    continue
                error = _output(probe, name, x if inputs is None else inputs(x), codes) - y
                rows[name][place] += float((gradient * error).double().square().sum())

        return take

    def hook(name: str) -> Callable[..., Tensor]:
        def watch(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            y = output if output.requires_grad else output.detach().requires_grad_()
            y.register_hook(arrived(name, given_input(args, kwargs).detach(), output.detach()))
            return y

        return watch

    asking = [p for p in probe.network.model.parameters() if p.requires_grad]
    handles = [probe.layer(name).register_forward_hook(hook(name), with_kwargs=True) for name in probe.layers]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            (gradients.loss(batch, gradients.run(batch)) * rows_of(batch)).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in asking:
            parameter.requires_grad_(True)
    return rows


def _output(probe: Probe, name: str, x: Tensor, codes: QTensor | None) -> Tensor:
    """What a layer gives for an input with its weight as codes; its hooks are not called."""
    layer = probe.layer(name)
    if codes is None:
        return layer.forward(x)
    with replaced_weight(layer, codes.dequantize()):
        return layer.forward(x)
