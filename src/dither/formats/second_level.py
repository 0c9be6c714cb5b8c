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
        parts = _in_groups(wide, size)
        low, high = torch.aminmax(parts, dim=1)
        offset = low.half().double()
        if positive:
            offset = offset.clamp_min(_SMALLEST)
        step = ((high - offset).clamp_min(0) / (2**bits - 1)).half().double().clamp_min(_SMALLEST)
        codes = ((parts - offset[:, None]) / step[:, None]).round_().clamp_(0, 2**bits - 1)
        codes = codes.flatten(0, 1)[: wide.shape[0]]
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
        codes = _in_groups(self.codes.float(), self.size)
        values = self.offset[:, None] + self.step[:, None] * codes
        return values.flatten(0, 1)[: self.codes.shape[0]]


def _in_groups(values: Float[Tensor, "R C"], size: int) -> Float[Tensor, "S size C"]:
    """Groups of `size` rows; the last row stands again where the last group has fewer."""
    missing = -values.shape[0] % size
    if missing:
        values = torch.cat([values, values[-1:].expand(missing, -1)])
    return values.reshape(-1, size, values.shape[1])
