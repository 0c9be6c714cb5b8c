"""PMPQ: a block is sensitive where predictions suffer from losing its smallest weights.

Source: CPTQuant (Nanda et al., arXiv 2412.03599), pruning mixed precision quantization, and its released code: the
smallest 30 % of every parameter of a block are set to zero, one block at a time.
Departs from the released code: damage is the divergence of the predictions on calibration data, larger for more harm
(there a change of accuracy, or of perplexity with the sign turned round, on the test data); exactly the smallest share
is cut, also of large tensors; scores are those of the network's own weights, which are put back after each block.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.blocks import Damage, changed, of_blocks


@dataclass(frozen=True)
class PMPQ:
    """`share` of every parameter of a block is cut."""

    name: ClassVar[str] = "pmpq"
    about: ClassVar[str] = "divergence when a block loses its smallest 30 % of weights (CPTQuant); a pass a block"

    share: float = 0.3

    @torch.no_grad()
    def measure(self, probe: Probe) -> Measured:
        """A forward pass over the data for each block."""
        names = {unit.name: unit.name for unit in probe.anatomy.units}
        measured = probe.each("pmpq", partial(self._unit, probe, Damage(probe, self.name)), names)
        found = dict(zip(names, measured, strict=True))
        errors = {name: error for name, (_, error) in found.items()}
        return of_blocks(probe, {name: score for name, (score, _) in found.items()}, {"standard_errors": errors})

    def _unit(self, probe: Probe, damage: Damage, name: str) -> list[float]:
        block = probe.network.model.get_submodule(name)
        with changed({parameter: without_smallest(parameter, self.share) for parameter in block.parameters()}):
            return list(damage())


def without_smallest(values: Float[Tensor, "..."], share: float) -> Float[Tensor, "..."]:
    """The tensor with the smallest `share` of its entries (rounded down) set to zero."""
    flat = values.detach().flatten().clone()
    count = int(share * flat.numel())
    flat[torch.topk(flat.abs(), count, largest=False).indices] = 0
    return flat.reshape(values.shape)
