"""Round column by column, with small groups fitted on the way and outliers decided column by column (SpQR).

Source: SpQR (Dettmers et al., ICLR 2024, arXiv 2306.03078), algorithm 1 and section 3; the relative threshold is that
of the released code. The Hessian may be any positive semidefinite [i, i] matrix, of any scale.
Departs from the released code: an outlier's code is the nearest one instead of zero's, so that what is stored beside it
is small; scales of scales are stored as step and offset (formats/second_level.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.mixed import MixedGrid
from dither.formats.qtensor import QTensor, quantize
from dither.formats.sparse import Sparse
from dither.formats.spec import QuantSpec
from dither.solvers.columns import Ordered, sweep
from dither.solvers.outliers import filled_with_mean, leave_one_out_gains
from dither.solvers.rounders import OnTheWay, Rounder, fit_group, on_grid

Cutoff = Callable[[Ordered, QuantSpec], float]  # the squared error over U_jj² from which on a weight is an outlier


def above_threshold(threshold: float) -> Cutoff:
    """As published: an outlier's error exceeds this share of the mean of var(column j) / U_jj²."""

    def limit(ordered: Ordered, _spec: QuantSpec) -> float:
        return float(threshold * (_variance(ordered.weight) * _sensitivity(ordered)).mean())

    return limit


def largest_share(share: float) -> Cutoff:
    """An outlier's error is among this share of the largest that rounding to nearest makes; 0 leaves none.

    Compensation enlarges errors, so that some more weights are kept than asked for, up to several times as many.
    [choice] At 2 bits errors are a large part of the weights' variance, so that no threshold suits several widths.
    """

    def limit(ordered: Ordered, spec: QuantSpec) -> float:
        nearest = quantize(ordered.weight.float(), fit_grid(ordered.weight.float(), spec)).dequantize()
        errors = ((ordered.weight - nearest).square() * _sensitivity(ordered)).flatten()
        kept = min(round(share * len(errors)), len(errors) - 1)
        return float(errors.kthvalue(len(errors) - kept).values) if kept else torch.inf

    return limit


@dataclass(frozen=True)
class Deciding:
    """Another rounder, except for entries whose error it would cost more than `limit` to compensate: these stay."""

    inner: Rounder
    diagonal: Float[Tensor, " n"]  # of U, with UᵀU the inverse Hessian
    limit: float
    outliers: list[Bool[Tensor, " o"]]  # one mask a place, in the order of the sweep

    @property
    def size(self) -> int:
        """Columns of a group."""
        return self.inner.size

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Hand on the group."""
        self.inner.enter(start, current)

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """The entry itself where it is an outlier."""
        value = self.inner.value(place, column)
        outlier = ((column - value) / self.diagonal[place]).square() > self.limit
        self.outliers.append(outlier)
        return torch.where(outlier, column, value)


def round_with_outliers(
    weight: Float[Tensor, "o i"],
    hessian: Float[Tensor, "i i"],
    spec: QuantSpec,
    damping: float,
    act_order: bool,
    cutoff: Cutoff,
    leave_one_out: bool,
) -> tuple[QTensor, dict[str, float]]:
    """Codes and outliers of a weight, and notes with the share of outliers.

    `cutoff` says from where on an error is an outlier's. `leave_one_out` keeps likely outliers out of the range of
    their group. Tensor-wide grids, groups along the outputs, dual grids and codebooks are fitted once, to the weight.

    Raises:
        NumericalError: the damped Hessian is not positive definite at any step of the ladder.
        ShapeError: the group size does not divide.
    """
    columns = weight.shape[1]
    ordered = Ordered.of(weight, hessian, columns, damping, act_order)
    limit = cutoff(ordered, spec)
    if _groups_inputs(spec):
        by_column = ordered.restored(_sensitivity(ordered)[None])[0]
        fitted = OnTheWay.of(spec, ordered.order, _Fit(spec, by_column, limit if leave_one_out else None))
        found, mask = _decide(ordered, fitted, limit)
        grid = fitted.grid(spec)
    else:
        grid = fit_grid(weight.float(), spec)
        found, mask = _decide(ordered, on_grid(grid, weight, ordered.order), limit)
    return with_outliers(found.float(), grid, mask), ordered.notes | {"outliers": float(mask.double().mean())}


def _decide(ordered: Ordered, inner: Rounder, limit: float) -> tuple[Float[Tensor, "o i"], Bool[Tensor, "o i"]]:
    """The rounded weight and where its outliers are."""
    rounder = Deciding(inner, ordered.upper.diagonal(), limit, [])
    found = ordered.restored(sweep(ordered, rounder, len(ordered.order)))
    return found, ordered.restored(torch.stack(rounder.outliers, dim=1))


@dataclass(frozen=True)
class _Fit:
    """Fits a group without its likely outliers: those that save more than `limit` of error by leaving it."""

    spec: QuantSpec
    sensitivity: Float[Tensor, " i"]
    limit: float | None

    def __call__(self, group: Float[Tensor, "o g"], columns: Int[Tensor, " g"]) -> Grid | Codebook:
        """The grid of one group, one cell a row."""
        if self.limit is not None:
            likely = leave_one_out_gains(group, self.sensitivity[columns], self.spec) > self.limit
            group = filled_with_mean(group, likely)
        return fit_group(group, self.spec)


def with_outliers(
    weight: Float[Tensor, "o i"], grid: Grid | Codebook | MixedGrid, mask: Bool[Tensor, "o i"]
) -> QTensor:
    """A weight that lies on the grid except for the masked entries, which are stored beside it."""
    dense = quantize(weight, grid)
    return QTensor(dense.codes, grid, Sparse.of(weight - dense.dequantize(), mask))


def _groups_inputs(spec: QuantSpec) -> bool:
    """Whether every row of a group of columns has a cell of its own, on a uniform grid."""
    along = spec.granularity == "channel" or (spec.granularity == "group" and spec.group_along == "inputs")
    return along and not spec.dual and not spec.is_codebook


def _sensitivity(ordered: Ordered) -> Float[Tensor, " k"]:
    """1 / U_jj² of each column, in the order of the sweep."""
    return ordered.upper.diagonal().square().reciprocal()


def _variance(weight: Float[Tensor, "o i"]) -> Float[Tensor, " i"]:
    """Over the rows of each column, zero of a single row."""
    return weight.var(dim=0, correction=min(1, weight.shape[0] - 1))
