"""The low-rank correction of a weight that leaves the least output error: LoRC, LQER and QERA in one solve.

With E = W - Ŵ [o, i] and R = E[xᵀx], the best C of rank r under ‖x (E - C)ᵀ‖² is the part of E that lies in the leading
r output directions of its own output error: C = U Uᵀ E with U the first eigenvectors of E R Eᵀ. The error that is left
is the sum of the other eigenvalues.

Source: QERA (Zhang et al., ICLR 2025, arXiv 2410.06040), which writes the same C as SVD_r(E R^½) R^-½; R = I is LoRC
(ZeroQuant-V2, arXiv 2303.08302), R = diag(mean|x|)² is L²QER (arXiv 2402.02446), R = diag(E[x²]) is QERA-approx.
Departs from the papers: no root of R is inverted, so a singular R (few calibration rows, dead inputs) needs no floor;
both factors have equal norms (LoRC gives each the root of the singular values, QERA gives one all of them).
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import NonFiniteError, ShapeError
from dither.formats.low_rank import FactorType, LowRank
from dither.formats.qtensor import QTensor


def corrected(
    stored: QTensor,
    weight: Float[Tensor, "o i"],
    rank: int,
    second_moment: Float[Tensor, "..."] | None,
    dtype: FactorType = "float16",
) -> QTensor:
    """A stored weight with the best correction towards the true one; arguments and errors of `reconstruct_error`."""
    bare = replace(stored, low_rank=None)
    error = weight.double() - bare.dequantize(torch.float64)
    return replace(stored, low_rank=reconstruct_error(error, rank, second_moment, dtype))


def reconstruct_error(
    error: Float[Tensor, "o i"],
    rank: int,
    second_moment: Float[Tensor, "..."] | None,
    dtype: FactorType = "float16",
) -> LowRank:
    """Factors b [o, r] and a [r, i], as stored, of the best correction; r is `rank` or the smaller side of the matrix.

    `second_moment` is R [i, i], its diagonal [i], or None for the identity; its scale does not matter. Solves in
    float64.

    Raises:
        ShapeError: the rank is below 1, or the second moment does not fit the columns.
        NonFiniteError: NaN or Inf in the error or the second moment.
    """
    _check(error, rank, second_moment)
    wide = error.double()
    left = output_directions(wide, min(rank, *error.shape), second_moment)
    a, b = _balanced(left.T @ wide, left)
    return LowRank.of(a.float(), b.float(), dtype)


def output_directions(
    error: Float[Tensor, "o i"], rank: int, second_moment: Float[Tensor, "..."] | None
) -> Float[Tensor, "o r"]:
    """Orthonormal U [o, r]: the leading eigenvectors of E R Eᵀ, from whichever side of the matrix is the smaller."""
    if error.shape[0] <= error.shape[1]:
        output = (_times(error, second_moment) @ error.T).to(error)
        return _leading(output, rank)
    rooted = _times_root(error, second_moment)
    left: Tensor = torch.linalg.qr(rooted @ _leading(rooted.T @ rooted, rank)).Q
    return left


def _leading(symmetric: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n r"]:
    """Eigenvectors of the largest eigenvalues, the largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(1)


def _times(error: Float[Tensor, "o i"], second_moment: Float[Tensor, "..."] | None) -> Float[Tensor, "o i"]:
    """E R."""
    if second_moment is None:
        return error
    moment = second_moment.to(error)
    return error @ moment if moment.ndim == 2 else error * moment


def _times_root(error: Float[Tensor, "o i"], second_moment: Float[Tensor, "..."] | None) -> Float[Tensor, "o i"]:
    """E L with L Lᵀ = R; every such L gives the same output directions."""
    if second_moment is None:
        return error
    moment = second_moment.to(error)
    if moment.ndim == 1:
        return error * moment.sqrt()
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * values.clamp_min(0).sqrt()  # rounding leaves a singular R with values just below 0
    return error @ root


def _balanced(a: Float[Tensor, "r i"], b: Float[Tensor, "o r"]) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """The same product with rows of `a` and columns of `b` of equal norms, which suits storage of few digits."""
    tiny = torch.finfo(a.dtype).tiny
    ratio = (a.norm(dim=1).clamp_min(tiny) / b.norm(dim=0).clamp_min(tiny)).sqrt()
    return a / ratio[:, None], b * ratio


def _check(error: Float[Tensor, "o i"], rank: int, second_moment: Float[Tensor, "..."] | None) -> None:
    columns = error.shape[1]
    if rank < 1:
        raise ShapeError(f"expected a rank of at least 1, got {rank}")
    if second_moment is not None and second_moment.shape not in ((columns,), (columns, columns)):
        shape = tuple(second_moment.shape)
        raise ShapeError(f"expected a second moment of {columns} or {columns} x {columns} for the columns, got {shape}")
    for name, part in (("error", error), ("second moment", second_moment)):
        if part is not None and not bool(part.isfinite().all()):
            raise NonFiniteError(f"the {name} of a low-rank correction holds NaN or Inf")
