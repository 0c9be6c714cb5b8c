"""A fixed vector of noise that moves inputs before they are rounded, and what it does to the rounding error.

Source: NoisyQuant (Liu et al., CVPR 2023, arXiv 2211.16056): Q(x + N) - N has less error than Q(x) where x lies far
from the centre of its bin; the layer's bias takes back N. The paper gives the change of the error for noise that
reaches at most into the next bin; the integral below holds for any reach.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Distribution = Literal["uniform", "gaussian-legacy"]


def noise_direction(width: int, distribution: Distribution, generator: torch.Generator) -> Float[Tensor, " d"]:
    """One value a channel in [-1, 1), or the released code's normal values of mean -1 and deviation 2."""
    if distribution == "uniform":
        return 2 * torch.rand(width, generator=generator) - 1
    return 2 * torch.randn(width, generator=generator) - 1


def error_change(
    distance: Float[Tensor, "*n"], reach: float | Float[Tensor, "*#n"], half_bin: float | Float[Tensor, "*#n"]
) -> Float[Tensor, "*n"]:
    """D = E[(Q(x + N) - N - x)²] - (Q(x) - x)² with N uniform in ±`reach`, for x so far from its bin's centre.

    Bins are 2 * `half_bin` wide and without end. D < 0 says that the noise helps.
    """
    upper, lower = (_integral(distance + sign * reach, half_bin) for sign in (1, -1))
    return (upper - lower) / (2 * reach) - distance.square()


def _integral(end: Float[Tensor, "*n"], half_bin: float | Float[Tensor, "*#n"]) -> Float[Tensor, "*n"]:
    """Of the squared distance to the nearest centre, from 0 to `end`."""
    bins = torch.round(end / (2 * half_bin))
    rest = end - bins * 2 * half_bin
    return bins * (2 * half_bin**3 / 3) + rest**3 / 3


def best_reach(
    distance: Float[Tensor, " n"], half_bin: Float[Tensor, " n"], reaches: Float[Tensor, " k"]
) -> tuple[float, float]:
    """The reach whose mean change over all values is the lowest, and that change; (0, 0) where none is below 0."""
    changes = torch.stack([error_change(distance, reach, half_bin).mean() for reach in reaches])
    k = int(changes.argmin())
    return (float(reaches[k]), float(changes[k])) if float(changes[k]) < 0 else (0.0, 0.0)
