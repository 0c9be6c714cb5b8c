"""AWQ's clip search: how far to cut the range of each group so that its share of the output is closest.

Source: AWQ (Lin et al., MLSys 2024, arXiv 2306.00978) and its released code: ranges are cut at ±p times the largest
magnitude of the group, p = 1, 0.95 … 0.55; the error is that of the group's partial products x_g (w_g - ŵ_g).
Departs from the released code: the error comes from the blocks of the Gram on the diagonal, so it counts every
calibration token where the code draws 512; any uniform format may be searched, as long as each cell has its own range.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.cells import cell_errors, cell_extremes
from dither.formats.fit import fit_uniform, grid_of_ranges
from dither.formats.grid import Grid
from dither.formats.spec import QuantSpec

GRID, TRIED = 20, 10  # released code: n_grid 20, max_shrink 0.5


def clip_range(weight: Float[Tensor, "o i"], spec: QuantSpec, gram: Float[Tensor, "i i"] | None) -> Grid:
    """The grid whose every cell has the range, of `TRIED` ones, of least output error; `gram` may be scaled freely.

    Without a Gram all inputs count alike. Never worse, cell by cell, than the range of the extremes.

    Raises:
        SpecError: the format is not uniform.
        ShapeError: a group size does not divide.
    """
    start = fit_uniform(weight, spec.model_copy(update={"search": "minmax"}))
    low, high = cell_extremes(weight, start)
    largest = torch.maximum(low.abs(), high.abs())
    best, error = (low, high), torch.full_like(low, torch.inf)
    for step in range(TRIED):
        cut = largest * (1 - step / GRID)
        ends = torch.maximum(low, -cut), torch.minimum(high, cut)
        grid = grid_of_ranges(*ends, spec, start.row_of, start.column_of)
        found = cell_errors(weight - grid.round(weight), gram, grid)
        better = found < error
        error = torch.where(better, found, error)
        best = torch.where(better, ends[0], best[0]), torch.where(better, ends[1], best[1])
    return grid_of_ranges(*best, spec, start.row_of, start.column_of)
