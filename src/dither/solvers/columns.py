"""Round column by column; the columns that are left compensate each error (GPTQ).

Source: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), Algorithm 1; act-order and static groups as in the released
code. The sweep knows nothing of formats: it asks a `Rounder` for the value of each column, so uniform grids, codebooks,
weights that are kept and grids fitted on the way share one loop.
Departs from the released code: the triangular factor comes from a triangular solve, not from an inverse; a column
without any input is rounded to nearest instead of set to zero; a trailing bias column stays unrounded and compensates;
a grid fitted on the way sees every compensation made so far, also within a lazy block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dither.formats.codebook import Codebook
from dither.formats.grid import Grid, decode, encode
from dither.formats.spec import QuantSpec
from dither.solvers.cholesky import factorize, inverse_upper
from dither.solvers.outliers import filled_with_mean

BLOCK = 64  # released code: 128; measured: on a CPU 64 is faster, the result is the same


@dataclass(frozen=True)
class Rounded:
    """A weight [o, k] whose first columns lie on `grid` (unless kept), and what the solver had to do for it."""

    weight: Float[Tensor, "o k"]
    grid: Grid | Codebook
    notes: dict[str, float]


@dataclass(frozen=True)
class Ordered:
    """A weight in the order of its sweep, free columns last; `upper` is U with UᵀU the inverse of the damped Gram."""

    weight: Float[Tensor, "o k"]
    upper: Float[Tensor, "k k"]
    order: Int[Tensor, " k"]
    notes: dict[str, float]

    @classmethod
    def of(
        cls, weight: Float[Tensor, "o k"], gram: Float[Tensor, "k k"], columns: int, damping: float, act_order: bool
    ) -> "Ordered":
        """The first `columns` columns by falling input energy (act-order) or as they are.

        Raises:
            NumericalError: the damped Gram is not positive definite at any step of the ladder.
        """
        order = column_order(gram, columns, act_order)
        hessian = without_dead(gram.to(weight))[order][:, order]
        factor = factorize(hessian.flip(0, 1), damping)
        notes = {"damping": factor.damping, "tries": float(factor.tries)}
        return cls(weight[:, order], inverse_upper(factor.lower), order, notes)

    def restored(self, swept: Float[Tensor, "o k"]) -> Float[Tensor, "o k"]:
        """A matrix in the order of the sweep, its columns where they came from."""
        return swept[:, torch.argsort(self.order)]


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


def round_by_columns(
    weight: Float[Tensor, "o k"],
    gram: Float[Tensor, "k k"],
    grid: Grid | Codebook,
    columns: int,
    damping: float,
    act_order: bool,
    kept: Bool[Tensor, "o n"] | None = None,
) -> Rounded:
    """Round the first `columns` columns one after the other; whatever follows (the bias) only compensates.

    `gram` may be scaled freely; `damping` is in units of its mean diagonal. A diagonal Gram gives rounding to nearest.
    Entries of `kept` are never rounded: they make no error, take part in compensation and come back with it.

    Raises:
        NumericalError: the damped Gram is not positive definite at any step of the ladder.
    """
    ordered = Ordered.of(weight, gram, columns, damping, act_order)
    rounder: Rounder = _on_grid(grid, ordered, columns)
    swept = sweep(ordered, rounder if kept is None else _Keeping.of(rounder, kept, ordered, columns), columns)
    return Rounded(ordered.restored(swept), grid, ordered.notes)


GroupFit = Callable[[Float[Tensor, "o g"], Int[Tensor, " g"]], Grid | Codebook]


def round_by_groups(
    weight: Float[Tensor, "o k"],
    gram: Float[Tensor, "k k"],
    fit: GroupFit,
    spec: QuantSpec,
    columns: int,
    damping: float,
    act_order: bool,
    kept: Bool[Tensor, "o n"] | None = None,
) -> Rounded:
    """As `round_by_columns`, with the grid of each group of `spec` fitted when the sweep enters it (dynamic groups).

    `fit` gets the group's columns, compensated for every error made before (kept entries as the mean of the others),
    and their indices; it returns their grid of one cell a row. With act-order a group holds columns of like energy.

    Raises:
        NumericalError: the damped Gram is not positive definite at any step of the ladder.
    """
    ordered = Ordered.of(weight, gram, columns, damping, act_order)
    size = spec.group_size or columns
    fitted = _OnTheWay(ordered.order[:columns], size, fit, [])
    swept = sweep(ordered, fitted if kept is None else _Keeping.of(fitted, kept, ordered, columns), columns)
    column_of = torch.empty_like(ordered.order[:columns])
    column_of[ordered.order[:columns]] = torch.arange(columns, device=column_of.device) // size
    return Rounded(ordered.restored(swept), joined(fitted.grids, spec, column_of), ordered.notes)


def joined(grids: list[Grid | Codebook], spec: QuantSpec, column_of: Int[Tensor, " i"]) -> Grid | Codebook:
    """Grids of one cell a row side by side, as one grid whose column c uses grid `column_of[c]`."""
    first, scale = grids[0], torch.cat([grid.scale for grid in grids], dim=1)
    if isinstance(first, Codebook):
        levels = [grid.levels for grid in grids if isinstance(grid, Codebook)]
        return Codebook(spec, first.levels if spec.kind != "nuq" else torch.cat(levels, dim=1), scale, None, column_of)
    zero_point = torch.cat([grid.zero_point for grid in grids if isinstance(grid, Grid)], dim=1)
    return Grid(spec, scale, zero_point, None, column_of)


def column_order(gram: Float[Tensor, "k k"], columns: int, act_order: bool) -> Int[Tensor, " k"]:
    """Columns by falling input energy (act-order) or as they are; free columns last."""
    index = torch.arange(gram.shape[0], device=gram.device)
    if act_order:
        ranked = torch.argsort(gram.diagonal()[:columns], descending=True, stable=True)
        index = torch.cat([ranked, index[columns:]])
    return index


def without_dead(gram: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """A column that never had an input decouples: unit diagonal, so that it is rounded and compensates nothing."""
    dead = gram.diagonal() <= 0
    unit = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + torch.diag(torch.where(dead, unit, torch.zeros_like(unit)))


def sweep(ordered: Ordered, rounder: Rounder, count: int) -> Float[Tensor, "o k"]:
    """The weight with its first `count` places rounded and the rest compensated, in the order of the sweep."""
    weight, upper = ordered.weight.T.contiguous(), ordered.upper  # a column of the weight is then a contiguous row
    size = rounder.size
    for start, stop in lazy_blocks(count, size):
        block, corner = weight[start:stop], upper[start:stop, start:stop]
        errors, diagonal = torch.empty_like(block), corner.diagonal().tolist()
        for k in range(stop - start):
            if (start + k) % size == 0:
                rounder.enter(start + k, weight[start + k : min(start + k + size, count)])
            value = rounder.value(start + k, block[k])
            error = torch.sub(block[k], value, out=errors[k]).div_(diagonal[k])
            block[k + 1 :].addr_(corner[k, k + 1 :], error, alpha=-1)
            block[k] = value
        weight[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return weight.T


def lazy_blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most BLOCK places; none holds the beginning of a group of `size` whose end lies behind it.

    Within a block compensation is immediate, so every group is complete when the sweep enters it.
    """
    step = BLOCK // size * size if size <= BLOCK else size
    for first in range(0, count, step):
        end = min(first + step, count)
        yield from ((start, min(start + BLOCK, end)) for start in range(first, end, BLOCK))


def _on_grid(grid: Grid | Codebook, ordered: Ordered, columns: int) -> "_OnUniform | _OnCodebook":
    order, weight = ordered.order[:columns], ordered.weight
    if isinstance(grid, Codebook):
        levels, scale = grid.levels.to(weight), grid.scale.to(weight)
        return _OnCodebook(columns, replace(grid, levels=levels, scale=scale), order)
    cells = (part.to(weight).expand(weight.shape[0], columns).T.contiguous() for part in grid.cells(order))
    return _OnUniform(columns, grid.spec, *cells)


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


@dataclass(frozen=True)
class _OnCodebook:
    """A codebook fitted beforehand."""

    size: int
    grid: Codebook
    order: Int[Tensor, " n"]

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Nothing depends on the group."""

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """The nearest level."""
        return self.grid.round(column[:, None], self.order[place : place + 1])[:, 0]


@dataclass(frozen=True)
class _OnTheWay:
    """One grid a group, fitted to what the group's columns have become when the sweep enters it."""

    order: Int[Tensor, " n"]
    size: int
    fit: GroupFit
    grids: list[Grid | Codebook]

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Fit the grid of the group."""
        self.grids.append(self.fit(current.T, self.order[start : start + current.shape[0]]))

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """Nearest on the group's grid."""
        only = torch.zeros(1, dtype=torch.long, device=column.device)
        return self.grids[-1].round(column[:, None], only)[:, 0]


@dataclass(frozen=True)
class _Keeping:
    """Another rounder, except for entries that stay as they are."""

    inner: Rounder
    kept: Bool[Tensor, "n o"]

    @classmethod
    def of(cls, inner: Rounder, kept: Bool[Tensor, "o n"], ordered: Ordered, columns: int) -> "_Keeping":
        """With a mask in the order of the weight's columns."""
        return cls(inner, kept[:, ordered.order[:columns]].T.contiguous())

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
