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

from torch import Tensor

from dither.errors import InputError
from dither.models.gradients import NOT_RESIDENT, rows_of
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.outputs import Codes, Rows, mean_over_batches, stored_codes, weighed_errors
from dither.sensitivities.swap import Quantizers, fit_inputs


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher of layer outputs."""

    name: ClassVar[str] = "fisher"
    about: ClassVar[str] = "squared output gradient times squared output error (ModelOpt); one backward pass"

    def measure(self, probe: Probe) -> Measured:
        """The sum over each unit's layers, as a mean over samples."""
        if probe.network.weights is not None:
            raise InputError(f"fisher: {NOT_RESIDENT}")
        stored, quantizers = stored_codes(probe), fit_inputs(probe)
        tasks = {f"batch {index}": index for index in range(len(probe.batches))}
        found = probe.each("fisher", partial(_batch, probe, stored, quantizers), tasks)
        return mean_over_batches(probe, list(zip(map(rows_of, probe.batches), found, strict=True)))


def _batch(probe: Probe, stored: Codes, quantizers: Quantizers, index: int) -> Rows:
    batch = probe.batches[index]
    return weighed_errors(probe, batch, _loss(probe, batch), _squares, stored, quantizers)


def _loss(probe: Probe, batch: Any) -> Callable[[Any], Tensor]:
    """The sum of the samples' own losses."""
    loss, samples = probe.gradients().loss, rows_of(batch)
    return lambda output: loss(batch, output) * samples


def _squares(gradient: Tensor, error: Tensor) -> Tensor:
    return (gradient * error).double().square().sum()
