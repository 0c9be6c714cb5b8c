"""What a sweep over columns asks of a format: the value of each column, and a grid for each group of columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid, decode, encode, group_size
from dither.formats.mixed import MixedGrid
from dither.formats.second_level import SecondLevel
from dither.formats.spec import QuantSpec
from dither.solvers.outliers import filled_with_mean

GroupFit = Callable[[Float[Tensor, "o g"], Int[Tensor, " g"]], Grid | Codebook | MixedGrid]


@runtime_checkable
class Rounder(Protocol):
    """What the sweep asks of a format; places count columns in the order of the sweep."""

    @property
    def size(self) -> int:
        """Columns of a group."""

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """A group begins at place `start`; `current` are its columns with all compensation so far."""

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """What a column becomes."""


Cells = tuple[Float[Tensor, "n o"], Float[Tensor, "n o"], QuantSpec]


@runtime_checkable
class Uniform(Rounder, Protocol):
    """A rounder whose values are, or may be, the nearest on a uniform grid."""

    def cells(self, start: int, stop: int) -> Cells | None:
        """Scale, zero-point and format of places of the group entered last; None where its grid is not uniform."""


def on_grid(grid: Grid | Codebook | MixedGrid, weight: Float[Tensor, "o k"], order: Int[Tensor, " n"]) -> Rounder:
    """The rounder of a grid that is fitted already, for a sweep over `order` in the weight's dtype."""
    if isinstance(grid, MixedGrid):
        return _OnFitted(len(order), grid, order)
    if isinstance(grid, Codebook):
        levels, scale = grid.levels.to(weight), grid.scale.to(weight)
        return _OnFitted(len(order), replace(grid, levels=levels, scale=scale), order)
    cells = (part.to(weight).expand(weight.shape[0], len(order)).T.contiguous() for part in grid.cells(order))
    return _OnUniform(len(order), grid.spec, *cells)


@dataclass(frozen=True)
class _OnUniform:
    """A uniform grid fitted beforehand; scale and zero-point of a place are contiguous."""

    size: int
    spec: QuantSpec
    scale: Float[Tensor, "n o"]
    zero_point: Float[Tensor, "n o"]

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Nothing depends on the group."""

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """Nearest on the grid."""
        cell = self.scale[place], self.zero_point[place]
        return decode(encode(column, *cell, self.spec), *cell)

    def cells(self, start: int, stop: int) -> Cells:
        """Those of the places."""
        return self.scale[start:stop], self.zero_point[start:stop], self.spec


@dataclass(frozen=True)
class _OnFitted:
    """A codebook, or columns of different widths, fitted beforehand."""

    size: int
    grid: Codebook | MixedGrid
    order: Int[Tensor, " n"]

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Nothing depends on the group."""

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """The nearest value."""
        return self.grid.round(column[:, None], self.order[place : place + 1])[:, 0]


@dataclass(frozen=True)
class OnTheWay:
    """One grid a group, fitted to what the group's columns have become when the sweep enters it."""

    order: Int[Tensor, " n"]
    size: int
    fit: GroupFit
    grids: list[Grid | Codebook | MixedGrid]

    @classmethod
    def of(cls, spec: QuantSpec, order: Int[Tensor, " n"], fit: GroupFit) -> "OnTheWay":
        """For the groups of a format: single columns if they run along the outputs, all columns if there are none.

        Raises:
            ShapeError: the group size does not divide.
        """
        return cls(order, 1 if _along_outputs(spec) else group_size(spec, len(order)), fit, [])

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Fit the grid of the group."""
        self.grids.append(self.fit(current.T, self.order[start : start + current.shape[0]]))

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """Nearest on the group's grid."""
        within = place % self.size
        return self.grids[-1].round(column[:, None], slice(within, within + 1))[:, 0]

    def cells(self, start: int, stop: int) -> Cells | None:
        """The one of each row, for all places."""
        grid = self.grids[-1]
        if not isinstance(grid, Grid):
            return None
        scale, zero_point = (part.T.expand(stop - start, -1) for part in grid.cells(slice(0, 1)))
        return scale, zero_point, grid.spec

    def grid(self, spec: QuantSpec) -> Grid | Codebook | MixedGrid:
        """All groups as one grid of the whole matrix."""
        mixed = [grid for grid in self.grids if isinstance(grid, MixedGrid)]
        grids = [grid.base if isinstance(grid, MixedGrid) else grid for grid in self.grids]
        if _along_outputs(spec):
            return side_by_side([grids[place] for place in torch.argsort(self.order).tolist()], spec, None)
        column_of = torch.empty_like(self.order)
        column_of[self.order] = torch.arange(len(self.order), device=column_of.device) // self.size
        whole = side_by_side(grids, spec, column_of if spec.granularity == "group" else None)
        if not mixed or not isinstance(whole, Grid):
            return whole
        return MixedGrid(whole, torch.cat([grid.top for grid in mixed])[torch.argsort(self.order)])


@dataclass(frozen=True)
class Keeping:
    """Another rounder, except for entries that stay as they are."""

    inner: Rounder
    kept: Bool[Tensor, "n o"]

    @classmethod
    def of(cls, inner: Rounder, kept: Bool[Tensor, "o n"], order: Int[Tensor, " n"]) -> "Keeping":
        """With a mask in the order of the weight's columns."""
        return cls(inner, kept[:, order].T.contiguous())

    @property
    def size(self) -> int:
        """Columns of a group."""
        return self.inner.size

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Kept entries must not stretch the grid of the others."""
        kept = self.kept[start : start + current.shape[0]]
        self.inner.enter(start, filled_with_mean(current.T, kept.T).T)

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """The entry itself where it is kept."""
        return torch.where(self.kept[place], column, self.inner.value(place, column))


def group_spec(spec: QuantSpec) -> QuantSpec:
    """The format of one group by itself: one cell a row, or one column of groups along the outputs."""
    return spec if _along_outputs(spec) else spec.model_copy(update={"granularity": "channel", "group_size": None})


def fit_group(group: Float[Tensor, "o g"], spec: QuantSpec) -> Grid | Codebook:
    """The grid of one group, ranges searched as the format says."""
    return fit_grid(group.float(), group_spec(spec))


def side_by_side(
    grids: Sequence[Grid | Codebook], spec: QuantSpec, column_of: Int[Tensor, " i"] | None
) -> Grid | Codebook:
    """Grids of one group each as one grid, whose column c uses grid `column_of[c]`; None means grid c."""
    scale = torch.cat([grid.scale for grid in grids], dim=1)
    scale_codes = _joined([grid.scale_codes for grid in grids])
    if isinstance(grids[0], Codebook):
        levels = [grid.levels for grid in grids if isinstance(grid, Codebook)]
        table = torch.cat(levels, dim=1) if spec.kind == "nuq" else levels[0]
        return Codebook(spec, table, scale, grids[0].row_of, column_of, scale_codes)
    uniform = [grid for grid in grids if isinstance(grid, Grid)]
    zero_point = torch.cat([grid.zero_point for grid in uniform], dim=1)
    zero_point_codes = _joined([grid.zero_point_codes for grid in uniform])
    return Grid(spec, scale, zero_point, grids[0].row_of, column_of, scale_codes, zero_point_codes)


def _along_outputs(spec: QuantSpec) -> bool:
    return spec.granularity == "group" and spec.group_along == "outputs"


def _joined(parts: Sequence[SecondLevel | None]) -> SecondLevel | None:
    present = [part for part in parts if part is not None]
    return SecondLevel.joined(present) if present else None
