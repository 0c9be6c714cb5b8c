"""Scales of scales: a grid's scales (or zero-points) stored in a few bits themselves.

Source: SpQR (Dettmers et al., ICLR 2024, arXiv 2306.03078), section 3: groups of consecutive rows of one column group,
each on an asymmetric grid of its own with two float16 parameters. For nf4 and fp4 this takes the place of QLoRA's
double quantization: a uniform grid where bitsandbytes uses a dynamic map [choice], at the same bits.
Departs from SpQR: the grid is stored as step and offset, value = offset + step * code, not as scale and zero-point;
those of a group of nearly equal values would need a zero-point beyond float16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dither.errors import SpecError

_SMALLEST = 2.0**-24  # of float16
_LARGEST = 65504.0


@dataclass(frozen=True)
class SecondLevel:
    """A statistic [R, C] as codes; each `size` rows of a column share a step and an offset, the last may be fewer."""

    codes: UInt8[Tensor, "R C"]
    step: Float[Tensor, "S C"]
    offset: Float[Tensor, "S C"]
    size: int

    @classmethod
    def of(cls, values: Float[Tensor, "R C"], bits: int, size: int, positive: bool) -> "SecondLevel":
        """Nearest codes between the extremes of each group; `positive` keeps every decoded value above zero.

        Raises:
            SpecError: an extreme does not fit into float16.
        """
        wide = values.double()
        if bool((wide.abs() > _LARGEST).any()):
            raise SpecError(
                f"a scale or zero-point of {float(wide.abs().amax()):.4g} does not fit into {bits} bits of s"
            )
        parts = wide.split(size)
        low = torch.stack([part.amin(dim=0) for part in parts])
        high = torch.stack([part.amax(dim=0) for part in parts])
        offset = low.half().double()
        if positive:
            offset = offset.clamp_min(_SMALLEST)
        step = ((high - offset).clamp_min(0) / (2**bits - 1)).half().double().clamp_min(_SMALLEST)
        index = _group_of(values.shape[0], size, values.device)
        codes = torch.round((wide - offset[index]) / step[index]).clamp(0, 2**bits - 1)
        return cls(codes.to(torch.uint8), step.float(), offset.float(), size)

    @classmethod
    def joined(cls, parts: Sequence["SecondLevel"]) -> "SecondLevel":
        """The columns of all parts side by side."""
        codes, step, offset = (
            torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("codes", "step", "offset")
        )
        return cls(codes, step, offset, parts[0].size)

    def decode(self) -> Float[Tensor, "R C"]:
        """offset + step * code, in float32."""
        index = _group_of(self.codes.shape[0], self.size, self.codes.device)
        return self.offset[index] + self.step[index] * self.codes.float()


def _group_of(rows: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device) // size
