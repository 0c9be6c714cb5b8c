"""CMPQ: a block is sensitive where what it computes correlates little with what the other blocks compute.

s_l = 1 - mean over m ≠ l of the first canonical correlation of the outputs of blocks l and m, averaged over tokens.

Source: CPTQuant (Nanda et al., arXiv 2412.03599), canonical mixed precision quantization, and its released code.
Departs from the released code: a block is measured by its own output (there by that of the block before it), padding
does not count in means, correlations are regularised, and the bits of a budget go by an integer program over
s 4^-bits (`clusters`, the paper's way, is a solver).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.errors import InputError
from dither.models.gradients import NOT_RESIDENT
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.blocks import of_blocks
from dither.statistics.canonical import RIDGE, Rows, canonical_correlations, whitened


@dataclass(frozen=True)
class CMPQ:
    """`components` correlations are averaged: 1 as in the paper, 20 as in the authors' later scripts (SVCCA)."""

    name: ClassVar[str] = "cmpq"
    about: ClassVar[str] = "one minus the mean canonical correlation of a block with the others (CPTQuant); one pass"

    components: int = 1
    ridge: float = RIDGE

    @torch.no_grad()
    def measure(self, probe: Probe) -> Measured:
        """One forward pass over the data."""
        if probe.network.weights is not None:
            raise InputError(f"cmpq: {NOT_RESIDENT}")
        seen = {name: whitened(rows.values, self.ridge) for name, rows in _outputs(probe).items()}
        scores = {}
        for name, mine in seen.items():
            others = [
                canonical_correlations(mine, x, self.components).mean() for other, x in seen.items() if other != name
            ]
            scores[name] = 1.0 - float(torch.stack(others).mean()) if others else 1.0
        return of_blocks(probe, scores, {"samples": len(next(iter(seen.values())))})


def _outputs(probe: Probe) -> dict[str, Rows]:
    """The output of each block or layer outside of blocks, a mean over tokens or places for each sample."""
    found: dict[str, Rows] = {}
    mask: Tensor | None = None

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            rows = Rows(pooled(output[0] if isinstance(output, tuple) else output, mask))
            found[name] = found[name].merge(rows) if name in found else rows

        return hook

    names = [unit.name for unit in probe.anatomy.units]
    handles = [probe.network.model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        for batch in probe.batches:
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            probe.network.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def pooled(output: Float[Tensor, "b ..."], mask: Tensor | None) -> Float[Tensor, "b d"]:
    """The mean over tokens [b, t, d] that the mask keeps, or over places of a map [b, d, h, w]."""
    wide = output.detach().double()
    if wide.ndim == 4:
        return wide.mean(dim=(2, 3))
    if wide.ndim == 3 and mask is not None and mask.shape == wide.shape[:2]:
        kept = mask.to(wide)[:, :, None]
        return (wide * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
    return wide.flatten(1, -2).mean(dim=1) if wide.ndim > 2 else wide
