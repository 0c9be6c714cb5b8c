"""Turn per-channel activation scales behind a normalization into one scale, by moving the difference into the weights.

Source: RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254), scale reparameterization of LayerNorm activations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Fold:
    """New activation x' = x / ratio - shift per channel [d]."""

    ratio: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]


@dataclass(frozen=True)
class Reparameterization(Fold):
    """A fold whose new activation is quantized by one `scale` and `zero_point`."""

    scale: Float[Tensor, ""]
    zero_point: Float[Tensor, ""]


def reparameterization(
    scale: Float[Tensor, " d"], zero_point: Float[Tensor, " d"], symmetric: bool, round_zero_point: bool
) -> Reparameterization:
    """Ratio and shift that make every channel's range equal to that of the mean scale and mean zero-point.

    A symmetric format needs no shift, which is what a normalization without bias can offer. The released code keeps the
    mean zero-point unrounded, which an integer runtime cannot hold; `round_zero_point` says which is wanted.
    """
    mean_scale, mean_zero = scale.mean(), zero_point.mean()
    mean_zero = torch.round(mean_zero) if round_zero_point else mean_zero
    ratio = scale / mean_scale
    if symmetric:
        return Reparameterization(ratio, torch.zeros_like(ratio), mean_scale, zero_point[0])
    low, mean_low = -zero_point * scale, -mean_zero * mean_scale
    return Reparameterization(ratio, low / ratio - mean_low, mean_scale, mean_zero)


def fold_into_norm(
    weight: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None, change: Fold
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"] | None]:
    """Weight and bias of the normalization that now puts out x'; no bias comes back only where none is needed."""
    ratio, shift = change.ratio.to(weight), change.shift.to(weight)
    if bias is None and not bool(shift.any()):
        return weight / ratio, None
    old = torch.zeros_like(weight) if bias is None else bias
    return weight / ratio, old / ratio - shift


def fold_into_linear(
    weight: Float[Tensor, "o d"], bias: Float[Tensor, " o"] | None, change: Fold
) -> tuple[Float[Tensor, "o d"], Float[Tensor, " o"] | None]:
    """Weight and bias of a layer that reads x' and puts out what it did for x: W diag(r), b + W diag(r) shift."""
    ratio, shift = change.ratio.to(weight), change.shift.to(weight)
    scaled = weight * ratio
    if bias is None and not bool(shift.any()):
        return scaled, None
    old = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return scaled, old + scaled @ shift
