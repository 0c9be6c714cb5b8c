"""The error that each option makes in each layer's output, beside the gradient there: one backward pass for all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dither.errors import NonFiniteError
from dither.folding import replaced_weight
from dither.formats.qtensor import QTensor
from dither.models.layers import given_input
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.swap import Quantizers, quantizer_of

Rows = dict[str, list[float]]  # layer → a number for each option
Reduce = Callable[[Tensor, Tensor], Tensor]  # (gradient, error), both of an output's shape → one number
HELD = 2**33  # bytes of codes in memory


@dataclass
class Codes:
    """Every layer's codes as every option, a byte a weight; beyond `HELD` bytes they are made or read again."""

    probe: Probe
    held: dict[tuple[str, int], QTensor | None] = field(default_factory=dict)

    def __call__(self, name: str, place: int) -> QTensor | None:
        """None where the option leaves the weight as it is, or the layer cannot have it."""
        key = (name, place)
        if key in self.held:
            return self.held[key]
        return self.probe.codes(name, place)


def stored_codes(probe: Probe) -> Codes:
    """The codes of all layers and options, as many of them held as there is room for."""
    probe.solve()
    found, nbytes = Codes(probe), 0
    for number, unit in enumerate(probe.units):
        able = probe.can(number)
        for name in unit.layers:
            for place, option in enumerate(probe.options):
                if option.weights is None or place not in able:
                    found.held[name, place] = None
                elif nbytes + probe.layer(name).weight.numel() <= HELD:
                    found.held[name, place] = probe.codes(name, place)
                    nbytes += probe.layer(name).weight.numel()
        probe.say("rounding", number + 1, len(probe.units))
    return found


def weighed_errors(
    probe: Probe, batch: Any, loss: Callable[[Any], Tensor], reduce: Reduce, stored: Codes, quantizers: Quantizers
) -> Rows:
    """`reduce` of the gradient and the error of each layer's output, summed over its calls, for each option.

    `loss` makes one number of what the model returns. Parameters get no gradients. What follows a layer may change its
    input and output in place (residual sums do), so the input is copied and the output computed again.
    """
    rows: Rows = {name: [0.0] * len(probe.options) for name in probe.layers}

    def arrived(name: str, x: Tensor) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def take(gradient: Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(f"the gradient of the output of {name} holds NaN or Inf")
            y = _output(probe, name, x, None)
            for place, option in enumerate(probe.options):
                codes, inputs = stored(name, place), quantizer_of(quantizers, name, option.activations)
                if codes is None and inputs is None:
                    continue
                error = _output(probe, name, x if inputs is None else inputs(x), codes) - y
                rows[name][place] += float(reduce(gradient, error))

        return take

    def hook(name: str) -> Callable[..., Tensor]:
        def watch(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            leaf = not output.requires_grad
            y = output.detach().requires_grad_() if leaf else output
            y.register_hook(arrived(name, given_input(args, kwargs).detach().clone()))
            return y + 0 if leaf else y  # a leaf cannot be changed in place

        return watch

    asking = [p for p in probe.network.model.parameters() if p.requires_grad]
    handles = [probe.layer(name).register_forward_hook(hook(name), with_kwargs=True) for name in probe.layers]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            loss(probe.network.run(batch)).backward()
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


def mean_over_batches(probe: Probe, parts: list[tuple[int, Rows]]) -> Measured:
    """Scores of units as a mean over samples, from (samples, sums of layers) of each batch; with standard errors."""
    tables = [(count, probe.table(probe.by_unit(rows))) for count, rows in parts]
    scores = np.sum([table for _, table in tables], axis=0) / sum(count for count, _ in tables)
    if len(tables) < 2:
        return Measured(scores)
    means = np.stack([np.where(np.isfinite(table), table, 0.0) / count for count, table in tables])
    return Measured(scores, means.std(axis=0, ddof=1) / len(tables) ** 0.5)
