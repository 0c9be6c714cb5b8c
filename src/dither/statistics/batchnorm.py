"""How far the channels of an activation are from the mean and variance that a batch normalization has stored.

Source: ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281), eq. 3; released code for per-sample statistics and eps.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Over = Literal["sample", "batch"]
EPS = 1e-6  # released code


def channel_moments(x: Float[Tensor, "b c *s"], over: Over) -> tuple[Float[Tensor, "r c"], Float[Tensor, "r c"]]:
    """Mean and unbiased variance of each channel: of each sample over its places [b, c], or of the whole batch [1, c].

    Samples without places (outputs of linear layers) have no variance of their own, so these are always of the batch.
    """
    places = x.flatten(2) if x.ndim > 2 else x.T[None]
    if x.ndim > 2 and over == "batch":
        places = places.transpose(0, 1).flatten(1)[None]
    return places.mean(dim=2), places.var(dim=2, unbiased=places.shape[2] > 1)


def moments_loss(
    x: Float[Tensor, "b c *s"], mean: Float[Tensor, " c"], variance: Float[Tensor, " c"], over: Over
) -> Float[Tensor, ""]:
    """‖mean - m‖² + ‖std - s‖², summed over channels, averaged over samples; differentiable in x."""
    found_mean, found_variance = channel_moments(x, over)
    spread = torch.sqrt(found_variance + EPS) - torch.sqrt(variance + EPS)
    return ((found_mean - mean).square().sum() + spread.square().sum()) / len(found_mean)
