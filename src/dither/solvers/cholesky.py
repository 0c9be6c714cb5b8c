"""Cholesky factors of Gram matrices, with a damping ladder whose every try is recorded.

A Gram of 11,008 columns takes a gigabyte in float64: LAPACK overwrites its input here, which needs column-major storage
(the transpose of a new row-major matrix), so that no step holds more than its argument and its result.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.errors import NonFiniteError, NumericalError

LADDER = (1.0, 10.0, 100.0)  # multiples of the asked-for damping


@dataclass(frozen=True)
class Factor:
    """Lower Cholesky factor of `matrix + damping * mean(diag) * I` and how it was reached."""

    lower: Float[Tensor, "k k"]
    damping: float
    tries: int

    def solve(self, right: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
        """The solution X of the damped system times X = right."""
        return torch.cholesky_solve(right, self.lower)


def factorize(
    matrix: Float[Tensor, "k k"],
    damping: float,
    order: Int[Tensor, " k"] | None = None,
    added: Float[Tensor, " k"] | None = None,
    dtype: torch.dtype | None = None,
) -> Factor:
    """Factor `matrix` with `damping` in units of its mean diagonal; a failure climbs the ladder, ten times a step.

    Rows and columns are taken in an `order`, with something `added` to the diagonal in that order, in a `dtype`; all
    of it costs no copy besides the factor.

    Raises:
        NonFiniteError: the matrix holds NaN or Inf.
        NumericalError: no step of the ladder gives a positive definite matrix.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"Gram matrix of {matrix.shape[0]} columns holds NaN or Inf")
    order = torch.arange(matrix.shape[0], device=matrix.device) if order is None else order
    diagonal = matrix.diagonal()[order].to(dtype) + (0 if added is None else added)
    unit = diagonal.mean()
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    for tries, step in enumerate(LADDER, start=1):
        lower = matrix[order[:, None], order].to(dtype).T  # it is symmetric
        lower.diagonal().copy_(diagonal + float(damping * step * unit))
        failed = torch.empty(0, dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed):
            return Factor(lower, damping * step, tries)
    raise NumericalError(
        f"Cholesky of a Gram matrix of {matrix.shape[0]} columns failed up to damping {damping * LADDER[-1]:g} "
        "of its mean diagonal; use more calibration data or a larger damping"
    )


def damped(matrix: Float[Tensor, "k k"], amount: float) -> Float[Tensor, "k k"]:
    """matrix + amount * I as a new tensor."""
    result = matrix.clone()
    result.diagonal().add_(amount)
    return result


def inverse_of_upper(upper: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The inverse of an upper triangular matrix.

    Of the lower factor of M with rows and columns reversed, reversed again, which is an upper R with M = R Rᵀ, it is
    the upper U with UᵀU = M⁻¹: one triangular solve, no inverse of M.
    """
    inverse = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device).T
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    return inverse
