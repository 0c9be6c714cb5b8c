"""What the sensitivities of CPTQuant share: a number for each block, and what it says of every unit and option."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from dither.errors import InputError
from dither.models.gradients import NOT_RESIDENT, rows_of
from dither.models.losses import class_rows
from dither.sensitivities.base import Measured, Probe
from dither.statistics.divergence import kl_rows, mean_and_error
from dither.statistics.hutchinson import positive


def of_blocks(probe: Probe, scores: Mapping[str, float], facts: Mapping[str, object]) -> Measured:
    """Scores of units from those of blocks: a unit's share of its block's weights, times 4^-bits.

    The sensitivities themselves are the priority. One that is not positive counts as a hundredth of the median one.
    """
    owner = {name: unit.name for unit in probe.anatomy.units for name in unit.layers}
    sizes = {name: probe.layer(name).weight.numel() for name in probe.layers}
    whole = dict.fromkeys(scores, 0)
    for name in probe.layers:
        whole[owner[name]] += sizes[name]
    usable = dict(zip(scores, positive(list(scores.values())), strict=True))
    falls = [0.0 if option.weights is None else 4.0**-option.weights.bits for option in probe.options]
    rows = {
        name: [usable[owner[name]] * sizes[name] / whole[owner[name]] * fall for fall in falls] for name in probe.layers
    }
    priority = np.array(
        [
            sum(scores[owner[n]] * sizes[n] for n in unit.layers) / sum(sizes[n] for n in unit.layers)
            for unit in probe.units
        ]
    )
    return Measured(probe.table(probe.by_unit(rows)), priority=priority, facts={"blocks": dict(scores), **facts})


@contextmanager
def changed(tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """While open, parameters hold other values; afterwards their own, to the last bit."""
    before = {parameter: parameter.detach().clone() for parameter in tensors}
    try:
        with torch.no_grad():
            for parameter, value in tensors.items():
                parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)


class Damage:
    """How far predictions move from those of the full-precision network: mean KL over samples, and its standard error.

    Unlike a change of accuracy or perplexity it needs no labels, is 0 for the network itself, and has one sign.
    """

    def __init__(self, probe: Probe, name: str) -> None:
        if probe.network.weights is not None:
            raise InputError(f"{name}: {NOT_RESIDENT}")
        self.probe = probe
        self.reference = [class_rows(probe.network.run(batch)).clone() for batch in probe.batches]

    def __call__(self) -> tuple[float, float]:
        parts = []
        for batch, wanted in zip(self.probe.batches, self.reference, strict=True):
            rows, samples = kl_rows(wanted, class_rows(self.probe.network.run(batch))), rows_of(batch)
            parts.append(rows.reshape(samples, -1).mean(dim=1) if samples and len(rows) % samples == 0 else rows)
        return mean_and_error(torch.cat(parts))
