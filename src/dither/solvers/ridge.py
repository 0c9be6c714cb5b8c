"""Ridge regression on Gram matrices: how weights absorb an error that the inputs make.

Source: ERQ (Zhong et al., ICML 2024; extended in arXiv 2407.06794), activation quantization error reduction (Aqer).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import NumericalError
from dither.solvers.cholesky import damped
from dither.statistics.gram import Gram


def ridge(gram: Float[Tensor, "k k"], right: Float[Tensor, "k m"], lam: float) -> Float[Tensor, "k m"]:
    """(G + lam I)⁻¹ right by a Cholesky solve.

    Raises:
        NumericalError: G + lam I is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(damped(gram, lam))
    if int(failed):
        raise NumericalError(f"ridge over {gram.shape[0]} columns is singular at lam {lam:g}; use a larger lam_mean")
    return torch.cholesky_solve(right, lower)


def absorb_activation_error(weight: Float[Tensor, "o k"], gram: Gram, lam: float) -> Float[Tensor, "o k"]:
    """W + dW with dW minimising ‖A Wᵀ - Â (W + dW)ᵀ‖² + lam ‖dW‖²; dW = 0 where  = A (Aqer).

    The gradient vanishes at (G + lam I) dWᵀ = (ÂᵀA - G) Wᵀ with G = ÂᵀÂ; a bias is one more column, regularised too.
    """
    difference = (gram.cross - gram.quantized).to(weight)
    return weight + ridge(gram.quantized.to(weight), difference @ weight.T, lam).T
