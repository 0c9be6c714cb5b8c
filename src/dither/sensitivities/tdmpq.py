"""TDMPQ: a block is sensitive where predictions move when its weights are disturbed a little.

Source: CPTQuant (Nanda et al., arXiv 2412.03599), Taylor decomposition mixed precision quantization.
Departs from the released code: all linear weights of a block are disturbed (there only its first parameter), by noise
relative to each weight's own root mean square (there of variance one), several times, and what is measured is the
change against the network itself, as the divergence of its predictions (there the disturbed loss as it is).
`first_order=true` takes the first term of the series instead, for each option: |⟨gradient, Q(W) - W⟩| summed over
layers, which AutoRound's scheme search uses; one backward pass serves all options.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import InputError
from dither.models.gradients import NOT_RESIDENT
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.blocks import Damage, changed, of_blocks

_STRIDE = 1_000_003  # between the seeds of draws


@dataclass(frozen=True)
class Total:
    """A sum of gradients."""

    values: Float[Tensor, "o i"]

    def merge(self, other: "Total") -> "Total":
        """Of both."""
        return Total(self.values + other.values)


@dataclass(frozen=True)
class TDMPQ:
    """`draws` of noise of `size` times the root mean square of each weight."""

    name: ClassVar[str] = "tdmpq"
    about: ClassVar[str] = "divergence under small noise on a block's weights (CPTQuant); a pass a block and draw"

    size: float = 0.01
    draws: int = 4
    first_order: bool = False

    def measure(self, probe: Probe) -> Measured:
        """Forward passes for each block and draw, or one backward pass over the data."""
        if self.first_order:
            return self._first_order(probe)
        with torch.no_grad():
            names = {unit.name: number for number, unit in enumerate(probe.anatomy.units)}
            measured = probe.each("tdmpq", partial(self._unit, probe, Damage(probe, self.name)), names)
            found = dict(zip(names, measured, strict=True))
        scores = {name: sum(values) / len(values) for name, values in found.items()}
        return of_blocks(probe, scores, {"draws": found})

    def _unit(self, probe: Probe, damage: Damage, number: int) -> list[float]:
        layers, found = probe.anatomy.units[number].layers, []
        for draw in range(self.draws):
            generator = torch.Generator().manual_seed((probe.seed * _STRIDE + number) * _STRIDE + draw)
            weights = {name: probe.layer(name).get_parameter("weight") for name in layers}
            with changed({weight: disturbed(weight, self.size, generator) for weight in weights.values()}):
                found.append(damage()[0])
        return found

    def _first_order(self, probe: Probe) -> Measured:
        if probe.network.weights is not None:
            raise InputError(f"tdmpq: {NOT_RESIDENT}")
        probe.solve()
        gradients = probe.gradients()
        sums = gradients.accumulate(dict.fromkeys(probe.layers, Total))
        rows = {}
        for number, unit in enumerate(probe.units):
            able = probe.can(number)
            for name in unit.layers:
                weight, slope = probe.weight(name), sums[name].values / gradients.count
                moved = [
                    probe.stored(name, place) - weight if place in able else None for place in range(len(probe.options))
                ]
                rows[name] = [0.0 if one is None else float((slope * one).double().sum().abs()) for one in moved]
        return Measured(probe.table(probe.by_unit(rows)))


def disturbed(weight: Float[Tensor, "..."], size: float, generator: torch.Generator) -> Float[Tensor, "..."]:
    """The weight plus normal noise of `size` times its root mean square, drawn on the CPU."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + size * weight.square().mean().sqrt() * noise
