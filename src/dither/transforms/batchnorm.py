"""Fold a batch normalization into the layer before it: at inference both are one affine map.

Source: common practice; written out in Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, CVPR 2018, arXiv 1712.05877, eq. 14.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ChannelNorm:
    """y = weight * (x - mean) / sqrt(variance + eps) + bias for each channel [o], all in float64."""

    weight: Float[Tensor, " o"]
    bias: Float[Tensor, " o"]
    mean: Float[Tensor, " o"]
    variance: Float[Tensor, " o"]
    eps: float

    @property
    def scale(self) -> Float[Tensor, " o"]:
        """What x is multiplied by."""
        return self.weight / torch.sqrt(self.variance + self.eps)

    @property
    def shift(self) -> Float[Tensor, " o"]:
        """What is added then."""
        return self.bias - self.mean * self.scale


def fold_norm(
    weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, norm: ChannelNorm
) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
    """Weight and bias of the layer that puts out what the normalization behind it did; computed in float64."""
    rows = weight.double() * norm.scale[:, None]
    offset = norm.shift if bias is None else norm.shift + bias.double() * norm.scale
    return rows.to(weight.dtype), offset.to(weight.dtype)
