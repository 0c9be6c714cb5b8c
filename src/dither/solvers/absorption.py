"""Closed form by which the channels that are left stand in for channels that were pruned or quantized (UDFC).

Channel j of a layer is an affine filter: its weights V_j and an offset t_j. With those that are left, D and t,

    l_j(s) = ‖V_j - Dᵀ s‖² + a (t_j - tᵀ s)² + b ‖s - p_j‖²

is minimal at s = (D Dᵀ + a t tᵀ + b I)⁻¹ (D V_j + a t_j t + b p_j), and the layer behind takes Σ_j s_ji W[:, j] as its
weights of channel i.

Source: UDFC (Bai et al., Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning, ICCV 2023,
arXiv 2308.07209); the algebra is derived here from its assumption, as its text and code could not be read.
Departs from it: the prior p_j may be the channel itself instead of zero, and `b` relative to the mean of diag(D Dᵀ).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.errors import NumericalError


@dataclass(frozen=True)
class Filters:
    """Channels as affine filters, known by their inner products, so that composed ones need not be written out.

    `cross` [m, c] holds ⟨D_i, V_j⟩ and `left` [m, m] ⟨D_i, D_j⟩ of the c channels as they were
    and the m that are left; `offsets` and `left_offsets` are t.
    """

    cross: Float[Tensor, "m c"]
    left: Float[Tensor, "m m"]
    offsets: Float[Tensor, " c"]
    left_offsets: Float[Tensor, " m"]

    @classmethod
    def of(
        cls,
        rows: Float[Tensor, "c n"],
        offsets: Float[Tensor, " c"],
        left: Float[Tensor, "m n"],
        left_offsets: Float[Tensor, " m"],
    ) -> "Filters":
        """Filters whose weights are the rows of matrices."""
        true, found = rows.double(), left.double()
        return cls(found @ true.T, found @ found.T, offsets.double(), left_offsets.double())

    def behind(self, other: "Filters") -> "Filters":
        """These filters (of a depthwise convolution), each run on the channel that another one puts out.

        Whatever acts between the two is neglected: ⟨k_i V_i, k_j V_j⟩ = ⟨k_i, k_j⟩ ⟨V_i, V_j⟩ on separate axes.
        """
        return Filters(self.cross * other.cross, self.left * other.left, self.offsets, self.left_offsets)


def absorption(
    filters: Filters,
    kept: Int[Tensor, " m"],
    offset_weight: float,
    ridge: float,
    relative: bool,
    identity: bool,
) -> Float[Tensor, "c m"]:
    """The coefficients s of every channel [c] over those that are left [m]; `kept` says which channels these are.

    `offset_weight` is a, `ridge` b, counted in the mean of diag(D Dᵀ) if `relative`. With `identity` a channel that is
    left has itself as prior, others zero.

    Raises:
        NumericalError: the filters are linearly dependent and there is no ridge.
    """
    matrix = filters.left + offset_weight * torch.outer(filters.left_offsets, filters.left_offsets)
    scale = float(filters.left.diagonal().mean()) if relative else 1.0
    matrix.diagonal().add_(ridge * scale)
    right = filters.cross + offset_weight * torch.outer(filters.left_offsets, filters.offsets)
    if identity:
        right[torch.arange(len(kept), device=kept.device), kept] += ridge * scale
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise NumericalError(f"the {len(kept)} filters that are left are linearly dependent; use a larger ridge")
    solved: Tensor = torch.cholesky_solve(right, lower)
    return solved.T


def absorbed(weight: Float[Tensor, "o c *k"], coefficients: Float[Tensor, "c m"]) -> Float[Tensor, "o m *k"]:
    """The weights of the layer behind over the channels that are left: W'[:, i] = Σ_j s_ji W[:, j]."""
    moved: Tensor = torch.tensordot(weight.double(), coefficients.to(weight.device), dims=([1], [0]))
    return moved.movedim(-1, 1).to(weight.dtype)


def selection(kept: Int[Tensor, " m"], channels: int) -> Float[Tensor, "c m"]:
    """The coefficients of leaving everything as it is: a row of the identity for a channel that is left, else zero."""
    chosen = torch.zeros(channels, len(kept), dtype=torch.float64, device=kept.device)
    chosen[kept, torch.arange(len(kept), device=kept.device)] = 1
    return chosen
