"""Canonical correlation: how much of one representation another one holds, whatever their coordinates are.

Source: Hotelling 1936; SVCCA (Raghu et al., NeurIPS 2017, arXiv 1706.05806), as CPTQuant (arXiv 2412.03599) uses them.
Departs from CPTQuant: covariances are regularised by `ridge` times their mean eigenvalue, without which any two sets of
fewer samples than dimensions correlate perfectly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import InputError

RIDGE = 1e-3


@dataclass(frozen=True)
class Rows:
    """Samples [n, d] of a representation, in float64."""

    values: Float[Tensor, "n d"]

    def merge(self, other: "Rows") -> "Rows":
        """Those of both, in order."""
        return Rows(torch.cat([self.values, other.values]))


def whitened(x: Float[Tensor, "n d"], ridge: float = RIDGE) -> Float[Tensor, "n k"]:
    """Centred samples in coordinates of covariance one, but for what the ridge takes; k is the smaller of n and d.

    Raises:
        InputError: fewer than two samples.
    """
    if len(x) < 2:
        raise InputError("correlations need at least two samples; give more calibration data")
    wide = x.double()
    left, size, _ = torch.linalg.svd(wide - wide.mean(dim=0), full_matrices=False)
    amount = ridge * size.square().sum() / x.shape[1]
    found: Float[Tensor, "n k"] = left * (size / (size.square() + amount).sqrt().clamp_min(1e-300))
    return found


def canonical_correlations(x: Float[Tensor, "n k"], y: Float[Tensor, "n l"], count: int = 1) -> Float[Tensor, " c"]:
    """The largest `count` correlations of two whitened sets of the same samples, between 0 and 1, falling."""
    found: Float[Tensor, " c"] = torch.linalg.svdvals(x.T @ y)[:count].clamp(0, 1)
    return found
