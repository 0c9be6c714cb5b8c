"""Ridge and column-by-column rounding over many small Grams at once, one for each group of a grouped convolution.

Source: as `solvers/ridge.py` (ERQ's Aqer) and `solvers/columns.py` (GPTQ), for all groups in parallel.
Departs from these: columns are rounded in the order in which they are stored, as energies differ from group to group.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import NumericalError
from dither.formats.codebook import Codebook
from dither.formats.grid import Grid
from dither.solvers.cholesky import LADDER
from dither.solvers.rounders import on_grid
from dither.statistics.grouped_gram import GroupedGram


def absorb_by_group(weight: Float[Tensor, "o k"], gram: GroupedGram, lam: float) -> Float[Tensor, "o k"]:
    """W + dW with dW minimising ‖A Wᵀ - Â (W + dW)ᵀ‖² + lam ‖dW‖² for each group.

    Raises:
        NumericalError: a group's Gram is singular at this lam.
    """
    rows = weight.to(gram.quantized).unflatten(0, (len(gram.quantized), -1))
    lower, failed = torch.linalg.cholesky_ex(_damped(gram.quantized, lam * torch.ones_like(gram.quantized[:, 0, 0])))
    if bool(failed.any()):
        raise NumericalError(f"ridge over groups is singular at lam {lam:g}; use a larger lam_mean")
    change: Tensor = torch.cholesky_solve((gram.cross - gram.quantized) @ rows.mT, lower)
    absorbed: Tensor = (rows + change.mT).flatten(0, 1)
    return absorbed


def round_by_columns_in_groups(
    weight: Float[Tensor, "o k"], gram: GroupedGram, grid: Grid | Codebook, columns: int, damping: float
) -> tuple[Float[Tensor, "o k"], dict[str, float]]:
    """Put the first `columns` columns on the grid one after the other; the rest of each group's columns compensate.

    `damping` is in units of each group's mean diagonal. A trailing bias column stays free and compensates.

    Raises:
        NumericalError: a damped Gram is not positive definite at any step of the ladder.
    """
    result, group = weight.to(gram.quantized).clone(), gram.group_of(len(weight))
    upper, notes = _inverse_upper(gram.quantized, damping)
    rounder = on_grid(grid, result, torch.arange(columns, device=result.device))
    for place in range(columns):
        value = rounder.value(place, result[:, place])
        error = (result[:, place] - value) / upper[group, place, place]
        result[:, place + 1 :] -= error[:, None] * upper[group, place, place + 1 :]
        result[:, place] = value
    return result, notes


def _inverse_upper(gram: Float[Tensor, "g k k"], damping: float) -> tuple[Float[Tensor, "g k k"], dict[str, float]]:
    """Upper U of each group with UᵀU the inverse of its damped Gram; columns without input get a unit of their own."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    unit = diagonal.mean(dim=1)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    alive = gram + torch.diag_embed(torch.where(diagonal <= 0, unit[:, None], torch.zeros_like(diagonal)))
    for tries, step in enumerate(LADDER, start=1):
        lower, failed = torch.linalg.cholesky_ex(_damped(alive, damping * step * unit))
        if not bool(failed.any()):
            upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(wrong.any()):
                return upper, {"damping": damping * step, "tries": float(tries)}
    raise NumericalError(f"Cholesky of the Gram of a group failed up to damping {damping * LADDER[-1]:g}")


def _damped(gram: Float[Tensor, "g k k"], amount: Float[Tensor, " g"]) -> Float[Tensor, "g k k"]:
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return gram + amount[:, None, None] * eye
