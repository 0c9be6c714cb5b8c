"""Per-channel scales that move difficulty between an activation and the weights that read it: AWQ and SmoothQuant.

Source: AWQ (Lin et al., MLSys 2024, arXiv 2306.00978), SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438), and
their released codes: x' = x / s, W' = W diag(s), with 1 / s folded into the norm, or the linear layer, before.
Departs from the released codes: a channel without any input during calibration keeps scale 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.transforms.reparameterize import Fold

_SMALLEST = 1e-4  # AWQ released code
_SMOOTH_SMALLEST = 1e-5  # SmoothQuant released code


def awq_scale(magnitude: Float[Tensor, " d"], alpha: float) -> Float[Tensor, " d"]:
    """s = m^alpha of the mean magnitudes m of the inputs, over the root of its extremes' product; 1 for alpha 0."""
    live = magnitude > 0
    scale = magnitude.pow(alpha).clamp_min(_SMALLEST)
    if not bool(live.any()):
        return torch.ones_like(scale)
    middle = (scale[live].amax() * scale[live].amin()).sqrt()
    return torch.where(live, scale / middle, 1.0)


def smooth_scale(
    largest_input: Float[Tensor, " d"], largest_weight: Float[Tensor, " d"], alpha: float
) -> Float[Tensor, " d"]:
    """s = max|x|^alpha / max|w|^(1 - alpha), the weights' maximum over every layer that reads the activation."""
    inputs, weights = largest_input.clamp_min(_SMOOTH_SMALLEST), largest_weight.clamp_min(_SMOOTH_SMALLEST)
    scale = (inputs.pow(alpha) / weights.pow(1 - alpha)).clamp_min(_SMOOTH_SMALLEST)
    return torch.where(largest_input > 0, scale, 1.0)


def equalization(scale: Float[Tensor, " d"]) -> Fold:
    """The fold x' = x / scale."""
    return Fold(scale, torch.zeros_like(scale))


def fold_into_rows(
    weight: Float[Tensor, "d i"], bias: Float[Tensor, " d"] | None, scale: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "d i"], Float[Tensor, " d"] | None]:
    """Weight and bias of the layer before, which now puts out x / scale."""
    scale = scale.to(weight)
    return weight / scale[:, None], None if bias is None else bias / scale
