"""Codebooks fitted to a weight: a table of levels for each cell of a format, by weighted k-means."""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import SpecError
from dither.formats.codebook import Codebook
from dither.formats.fit import as_cells
from dither.formats.grid import column_index, grid_shape, row_index
from dither.formats.spec import QuantSpec
from dither.solvers.kmeans import kmeans


def fit_levels(weight: Float[Tensor, "o i"], spec: QuantSpec, importance: Float[Tensor, "o i"] | None) -> Codebook:
    """The levels of least Σ importance (weight - level)² in each cell of a nuq format, rounded to their storage.

    Entries of importance zero do not count; in a cell where none counts, all do.

    Raises:
        SpecError: another format, or a level does not fit into its storage dtype.
        ShapeError: a group size does not divide.
    """
    if spec.kind != "nuq" or spec.dual:
        raise SpecError(f"levels are fitted for nuqB, with one table a tensor, channel or group; got {spec}")
    rows, columns = weight.shape
    weighed = None if importance is None else as_cells(importance, spec)
    centroids = kmeans(as_cells(weight, spec), weighed, spec.levels).centroids
    levels = centroids.reshape(*grid_shape(spec, rows, columns), spec.levels).to(torch.float32)
    device = weight.device
    return Codebook.of_levels(spec, levels, row_index(spec, rows, device), column_index(spec, columns, device))
