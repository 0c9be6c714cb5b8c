"""What a matrix amounts to in each cell [R, C] of a grid: sums, extremes and output errors."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.formats.grid import Grid

Reduction = Literal["sum", "amin", "amax"]


def cell_sums(matrix: Float[Tensor, "o i"], grid: Grid) -> Float[Tensor, "R C"]:
    """Sum of the entries of each cell."""
    return _over_rows(_over_columns(matrix, grid, "sum"), grid, "sum")


def cell_extremes(matrix: Float[Tensor, "o i"], grid: Grid) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
    """The least and the largest entry of each cell."""
    low = _over_rows(_over_columns(matrix, grid, "amin"), grid, "amin")
    return low, _over_rows(_over_columns(matrix, grid, "amax"), grid, "amax")


def cell_errors(
    difference: Float[Tensor, "o i"], gram: Float[Tensor, "i i"] | None, grid: Grid
) -> Float[Tensor, "R C"]:
    """Squared output error that each cell alone would make: Σ over its rows of d G dᵀ on its columns; G = I for None.

    Cells of one row do not see each other, as in AWQ's search, where partial products of each group are compared.
    """
    count = grid.scale.shape[1]
    if gram is None:
        return cell_sums(difference.square(), grid)
    moment = gram.to(difference)
    if grid.column_of is None and count > 1:  # each column is a cell
        rows = difference.square() * moment.diagonal()
    elif grid.column_of is None:
        rows = ((difference @ moment) * difference).sum(dim=1, keepdim=True)
    else:
        groups = [(grid.column_of == group).nonzero()[:, 0] for group in range(count)]
        parts = [(difference[:, group], moment[group][:, group]) for group in groups]
        rows = torch.stack([((part @ block) * part).sum(dim=1) for part, block in parts], dim=1)
    return _over_rows(rows, grid, "sum")


def _over_columns(matrix: Float[Tensor, "o i"], grid: Grid, how: Reduction) -> Float[Tensor, "o C"]:
    count = grid.scale.shape[1]
    if grid.column_of is None:
        return matrix if count > 1 else _reduce(matrix, matrix.new_zeros(matrix.shape[1], dtype=torch.long), 1, how)
    return _reduce(matrix, grid.column_of, count, how)


def _over_rows(matrix: Float[Tensor, "o C"], grid: Grid, how: Reduction) -> Float[Tensor, "R C"]:
    count = grid.scale.shape[0]
    if grid.row_of is None:
        return matrix if count > 1 else _reduce(matrix.T, matrix.new_zeros(len(matrix), dtype=torch.long), 1, how).T
    return _reduce(matrix.T, grid.row_of, count, how).T


def _reduce(matrix: Float[Tensor, "m n"], index: Int[Tensor, " n"], count: int, how: Reduction) -> Float[Tensor, "m c"]:
    start = matrix.new_zeros(matrix.shape[0], count)
    return start.scatter_reduce(1, index.expand(len(matrix), -1), matrix, how, include_self=False)
