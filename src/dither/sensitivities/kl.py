"""ZeroQ's sensitivity: how far the predictions move when one unit alone is quantized.

Source: ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281), section 3.2: Ω_i(k) = 1/N Σ_j KL(M(x_j) ‖ M_i(k)(x_j)).
Departs from it: data are the user's calibration data, not distilled ones; layers that must share a choice are quantized
together; each unit is restored before the next one, which a re-implementation in use forgets.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dither.allocation.table import Unit
from dither.errors import InputError
from dither.models.gradients import NOT_RESIDENT, rows_of
from dither.models.losses import class_rows
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.swap import Quantizers, fit_inputs, quantizer_of, replaced
from dither.statistics.divergence import kl_rows, mean_and_error

_CACHE = 2**30  # bytes of reference logits that are kept; beyond it they are computed again for each unit


@dataclass(frozen=True)
class KL:
    """A forward pass over the data for each unit and option; `symmetric` averages both directions."""

    name: ClassVar[str] = "kl"
    about: ClassVar[str] = "KL of the outputs when one unit alone is quantized (ZeroQ); a pass for each unit and option"

    symmetric: bool = False

    def measure(self, probe: Probe) -> Measured:
        """Mean KL over the samples, and its standard error."""
        if probe.network.weights is not None:
            raise InputError(f"kl: {NOT_RESIDENT}")
        probe.solve()
        quantizers = fit_inputs(probe)
        reference = _Reference(probe)
        names = {unit.name: number for number, unit in enumerate(probe.units)}
        found = probe.each("kl", partial(self._unit, probe, quantizers, reference), names)
        rows: dict[str, list[tuple[float, float]]] = dict(zip(names, found, strict=True))
        scores = probe.table({name: [score for score, _ in row] for name, row in rows.items()})
        errors = np.array([[error for _, error in rows[unit.name]] for unit in probe.units])
        return Measured(scores, errors)

    def _unit(
        self, probe: Probe, quantizers: Quantizers, reference: "_Reference", number: int
    ) -> list[tuple[float, float]]:
        found = [(0.0, 0.0)] * len(probe.options)
        for place in probe.can(number):
            found[place] = self._option(probe, probe.units[number], place, quantizers, reference)
        return found

    @torch.no_grad()
    def _option(
        self, probe: Probe, unit: Unit, place: int, quantizers: Quantizers, reference: "_Reference"
    ) -> tuple[float, float]:
        option = probe.options[place]
        if option.weights is None and option.activations is None:
            return 0.0, 0.0
        weights = {name: probe.stored(name, place) for name in unit.layers}
        inputs = {name: quantizer_of(quantizers, name, option.activations) for name in unit.layers}
        parts = []
        for index, batch in enumerate(probe.batches):
            wanted = reference(index)
            with replaced(probe, weights, inputs):
                got = class_rows(probe.network.run(batch))
            parts.append(self._samples(wanted, got, rows_of(batch)))
        return mean_and_error(torch.cat(parts))

    def _samples(
        self, wanted: Float[Tensor, "n c"], got: Float[Tensor, "n c"], samples: int
    ) -> Float[Tensor, " samples"]:
        rows = kl_rows(wanted, got)
        if self.symmetric:
            rows = (rows + kl_rows(got, wanted)) / 2
        return rows.reshape(samples, -1).mean(dim=1) if samples and len(rows) % samples == 0 else rows


class _Reference:
    """The full-precision network's logits of each batch."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.known, self.nbytes = probe, dict[int, Tensor](), 0

    def __call__(self, index: int) -> Float[Tensor, "n c"]:
        if index in self.known:
            return self.known[index]
        logits = class_rows(self.probe.network.run(self.probe.batches[index]))
        if self.nbytes + logits.nbytes <= _CACHE:
            self.known[index], self.nbytes = logits, self.nbytes + logits.nbytes
        return logits
