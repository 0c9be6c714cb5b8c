"""LowRank: a correction b @ a of a weight, with both factors as they are stored.

In float16, or in int8 with one float16 scale for each row of `a` and each column of `b`: symmetric, 127 steps up to the
largest magnitude (LoRC, arXiv 2303.08302, stores its factors in 8 bits; how is our choice).
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import SpecError

FactorType = Literal["float16", "int8"]
_STEPS = 127
TensorLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class LowRank:
    """Factors a [r, i] and b [o, r] in float32, at the precision of their storage; int8 factors carry their scales."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    dtype: FactorType = "float16"
    scales: tuple[Float[Tensor, " r"], Float[Tensor, " r"]] | None = None  # of a's rows, of b's columns

    @classmethod
    def of(cls, a: Float[Tensor, "r i"], b: Float[Tensor, "o r"], dtype: FactorType = "float16") -> "LowRank":
        """Factors rounded to their storage precision.

        Raises:
            SpecError: a factor (or its scale) does not fit into float16.
        """
        if dtype == "float16":
            return cls(_half(a), _half(b), dtype)
        scales = _half(a.abs().amax(dim=1) / _STEPS), _half(b.abs().amax(dim=0) / _STEPS)
        scales = scales[0].clamp_min(2.0**-24), scales[1].clamp_min(2.0**-24)
        codes = _codes(a.float(), scales[0][:, None]), _codes(b.float(), scales[1])
        return cls(codes[0] * scales[0][:, None], codes[1] * scales[1], dtype, scales)

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """b @ a; computed in float32."""
        return (self.b @ self.a).to(dtype)

    @property
    def rank(self) -> int:
        """Number of rows of a."""
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk: both factors and their scales."""
        layout = low_rank_layout(self.rank, self.dtype, (self.b.shape[0], self.a.shape[1]))
        return sum(prod(size) * dtype.itemsize for size, dtype in layout.values())

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors by their short names."""
        if self.scales is None:
            return {"low_rank_a": self.a.to(torch.float16), "low_rank_b": self.b.to(torch.float16)}
        a, b = _codes(self.a, self.scales[0][:, None]), _codes(self.b, self.scales[1])
        return {
            "low_rank_a": a.to(torch.int8),
            "low_rank_b": b.to(torch.int8),
            "low_rank_a_scale": self.scales[0].to(torch.float16),
            "low_rank_b_scale": self.scales[1].to(torch.float16),
        }

    @classmethod
    def unpack(cls, parts: dict[str, Tensor], dtype: FactorType) -> "LowRank":
        """The inverse of `pack`."""
        a, b = parts["low_rank_a"].float(), parts["low_rank_b"].float()
        if dtype == "float16":
            return cls(a, b, dtype)
        scales = parts["low_rank_a_scale"].float(), parts["low_rank_b_scale"].float()
        return cls(a * scales[0][:, None], b * scales[1], dtype, scales)


def low_rank_layout(rank: int, dtype: FactorType, shape: tuple[int, int]) -> TensorLayout:
    """Shape and dtype of the stored tensors of factors of a weight [o, i]."""
    kind = torch.float16 if dtype == "float16" else torch.int8
    parts: TensorLayout = {"low_rank_a": ((rank, shape[1]), kind), "low_rank_b": ((shape[0], rank), kind)}
    if dtype == "int8":
        parts |= {"low_rank_a_scale": ((rank,), torch.float16), "low_rank_b_scale": ((rank,), torch.float16)}
    return parts


def _half(part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    rounded = part.to(torch.float16).float()
    if not bool(rounded.isfinite().all()):
        raise SpecError(f"a low-rank factor of {float(part.abs().amax()):.4g} does not fit into float16")
    return rounded


def _codes(part: Float[Tensor, "n m"], scale: Float[Tensor, "..."]) -> Float[Tensor, "n m"]:
    return torch.round(part / scale).clamp(-_STEPS, _STEPS)
