"""Round column by column; the columns that are left compensate each error (GPTQ).

Source: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), Algorithm 1; act-order and static groups as in the released
code. The sweep knows nothing of formats: it asks a `Rounder` for the value of each column, so uniform grids, codebooks,
weights that are kept and grids fitted on the way share one loop.
Departs from the released code: the triangular factor comes from a triangular solve, not from an inverse; a column
without any input is rounded to nearest instead of set to zero; a trailing bias column stays unrounded and compensates;
a grid fitted on the way sees every compensation made so far, also within a lazy block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dither.formats.codebook import Codebook
from dither.formats.grid import Grid
from dither.formats.mixed import MixedGrid
from dither.formats.spec import QuantSpec
from dither.kernels.column_sweep import sweep_uniform_
from dither.solvers.cholesky import factorize, inverse_of_upper
from dither.solvers.rounders import GroupFit, Keeping, OnTheWay, Rounder, Uniform, on_grid

BLOCK = 64  # released code: 128; measured: on a CPU 64 is faster, the result is the same


@dataclass(frozen=True)
class Rounded:
    """A weight [o, k] whose first columns lie on `grid` (unless kept), and what the solver had to do for it."""

    weight: Float[Tensor, "o k"]
    grid: Grid | Codebook | MixedGrid
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
        turned = order.flip(0)
        added = _for_dead(gram.diagonal()[turned].to(weight))
        factor = factorize(gram, damping, turned, added, weight.dtype)
        notes = {"damping": factor.damping, "tries": float(factor.tries)}
        reverse = factor.lower.flip(0, 1)
        del factor  # wide layers have no memory for one more matrix
        return cls(weight[:, order], inverse_of_upper(reverse), order, notes)

    def restored(self, swept: Shaped[Tensor, "o k"]) -> Shaped[Tensor, "o k"]:
        """A matrix in the order of the sweep, its columns where they came from."""
        return swept[:, torch.argsort(self.order)]


def round_by_columns(
    weight: Float[Tensor, "o k"],
    gram: Float[Tensor, "k k"],
    grid: Grid | Codebook | MixedGrid,
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
    rounder = on_grid(grid, weight, ordered.order[:columns])
    swept = sweep(ordered, rounder if kept is None else Keeping.of(rounder, kept, ordered.order[:columns]), columns)
    return Rounded(ordered.restored(swept), grid, ordered.notes)


def compensated_by_columns(
    weight: Float[Tensor, "o i"],
    gram: Float[Tensor, "i i"],
    grid: Grid | Codebook,
    damping: float,
    act_order: bool = True,
) -> Float[Tensor, "o i"]:
    """What `round_by_columns` rounds: each column with all compensation at its turn. Its nearest codes are GPTQ's.

    Raises:
        NumericalError: the damped Gram is not positive definite at any step of the ladder.
    """
    columns = weight.shape[1]
    ordered = Ordered.of(weight, gram, columns, damping, act_order)
    _, seen = traverse(ordered, on_grid(grid, weight, ordered.order), columns)
    return ordered.restored(seen)


def compensated_by_groups(
    weight: Float[Tensor, "o i"],
    gram: Float[Tensor, "i i"],
    fit: GroupFit,
    spec: QuantSpec,
    damping: float,
    act_order: bool = True,
) -> tuple[Float[Tensor, "o i"], Grid | Codebook | MixedGrid]:
    """What `round_by_groups` rounds, and the grid that it fits on the way.

    Raises:
        NumericalError: the damped Gram is not positive definite at any step of the ladder.
    """
    columns = weight.shape[1]
    ordered = Ordered.of(weight, gram, columns, damping, act_order)
    fitted = OnTheWay.of(spec, ordered.order, fit)
    _, seen = traverse(ordered, fitted, columns)
    return ordered.restored(seen), fitted.grid(spec)


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
    and their indices; it returns their grid, of one cell a row. With act-order a group holds columns of like energy.
    Groups along the outputs are fitted column by column, with one cell for each group of rows.

    Raises:
        NumericalError: the damped Gram is not positive definite at any step of the ladder.
    """
    ordered = Ordered.of(weight, gram, columns, damping, act_order)
    fitted = OnTheWay.of(spec, ordered.order[:columns], fit)
    swept = sweep(ordered, fitted if kept is None else Keeping.of(fitted, kept, ordered.order[:columns]), columns)
    return Rounded(ordered.restored(swept), fitted.grid(spec), ordered.notes)


def column_order(gram: Float[Tensor, "k k"], columns: int, act_order: bool) -> Int[Tensor, " k"]:
    """Columns by falling input energy (act-order) or as they are; free columns last."""
    index = torch.arange(gram.shape[0], device=gram.device)
    if act_order:
        ranked = torch.argsort(gram.diagonal()[:columns], descending=True, stable=True)
        index = torch.cat([ranked, index[columns:]])
    return index


def _for_dead(diagonal: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """A column that never had an input decouples: unit diagonal, so that it is rounded and compensates nothing."""
    unit = diagonal.mean().clamp_min(torch.finfo(diagonal.dtype).tiny)
    return torch.where(diagonal <= 0, unit, torch.zeros_like(unit))


def sweep(ordered: Ordered, rounder: Rounder, count: int) -> Float[Tensor, "o k"]:
    """The weight with its first `count` places rounded and the rest compensated, in the order of the sweep."""
    return traverse(ordered, rounder, count)[0]


def traverse(ordered: Ordered, rounder: Rounder, count: int) -> tuple[Float[Tensor, "o k"], Float[Tensor, "o k"]]:
    """What `sweep` gives, and every column as it was when its turn came, with all compensation."""
    weight, upper = ordered.weight.T.contiguous(), ordered.upper  # a column of the weight is then a contiguous row
    rounded, size = torch.empty_like(weight), rounder.size
    for start, stop in lazy_blocks(count, size):
        block, corner = weight[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for first in range(start, stop, min(size, stop - start)):  # a part belongs to one group
            last = min(first + size, stop)
            if first % size == 0:
                rounder.enter(first, weight[first : min(first + size, count)])
            part = slice(first - start, last - start)
            rounded[first:last], errors[part] = _round_part(rounder, block, corner, first, part)
        weight[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    rounded[count:] = weight[count:]
    return rounded.T, weight.T


def _round_part(
    rounder: Rounder, block_: Float[Tensor, "n o"], corner: Float[Tensor, "n n"], first: int, part: slice
) -> tuple[Float[Tensor, "m o"], Float[Tensor, "m o"]]:
    """Values and errors of a part of a block, which begins at place `first`; the columns behind it are compensated."""
    begin, end = part.start, part.stop
    cells = rounder.cells(first, first + end - begin) if isinstance(rounder, Uniform) else None
    if cells is not None:
        scale, zero_point, spec = cells
        return sweep_uniform_(block_, corner, scale.to(block_), zero_point.to(block_), spec, begin)
    values, errors = torch.empty_like(block_[part]), torch.empty_like(block_[part])
    for k, diagonal in enumerate(corner.diagonal()[part].tolist(), begin):
        values[k - begin] = rounder.value(first + k - begin, block_[k])
        error = torch.sub(block_[k], values[k - begin], out=errors[k - begin]).div_(diagonal)
        block_[k + 1 :].addr_(corner[k, k + 1 :], error, alpha=-1)
    return values, errors


def lazy_blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most BLOCK places; none holds the beginning of a group of `size` whose end lies behind it.

    Within a block compensation is immediate, so every group is complete when the sweep enters it.
    """
    step = BLOCK // size * size if size <= BLOCK else size
    for first in range(0, count, step):
        end = min(first + step, count)
        yield from ((start, min(start + BLOCK, end)) for start in range(first, end, BLOCK))
