"""Binary weights: two binarizations for columns that matter, one on either side of a split for the others (BiLLM).

Source: BiLLM (Huang et al., ICML 2024, arXiv 2402.04291) and its released code: salient columns by Hessian metric,
bell-shaped splitting, residual binarization, error compensation between blocks of columns.
A row's entries in a block and a class take one of four values: mean ± magnitude of two sides of a split, or, in salient
columns, mean ± first ± second magnitude. So codes have two bits, and each (row, block, class) a table of four levels.
Departs from the released code: an entry equal to its mean counts as above it; levels are those of the storage dtype
before errors are fed back; the search runs over slices of sorted columns, with the same candidates.
Ours, by choice: exact compensation between blocks, compensation within them, and the nearest of the four levels.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dither.errors import SpecError
from dither.formats.codebook import Codebook
from dither.formats.grid import group_size
from dither.formats.qtensor import QTensor, quantize
from dither.formats.ranges import scale_dtype
from dither.formats.spec import QuantSpec
from dither.solvers.columns import Ordered, sweep

MOST_SALIENT = 49  # released code: columns of a block that may be salient
SPLITS = 81  # released code: quantiles from 0.1 to 0.9
Metric = Literal["hessian", "magnitude"]
Search = Literal["metric", "weight"]
Feedback = Literal["diagonal", "block", "columns"]
Assignment = Literal["class", "nearest"]


@dataclass(frozen=True)
class BinarySettings:
    """What the released code leaves to flags, and what it fixes; see `methods/billm.py`."""

    metric: Metric = "hessian"
    search: Search = "metric"
    feedback: Feedback = "diagonal"
    assignment: Assignment = "class"


@dataclass(frozen=True)
class Split:
    """The classes of a block: columns that are salient, and the entries of the others beyond the split."""

    salient: Bool[Tensor, " n"]
    outer: Bool[Tensor, "o n"]


def binarize(
    x: Float[Tensor, "o n"], mask: Bool[Tensor, "o n"] | None = None, order: int = 1
) -> tuple[Float[Tensor, "o n"], Float[Tensor, "o L"]]:
    """Σ mean + magnitude * sign over residuals, of each row's masked entries, and the 2^order levels of each row.

    Order 1 is the least-squares choice of magnitude and signs around the mean.
    """
    count = x.shape[1] if mask is None else mask.sum(dim=1, keepdim=True).clamp_min(1)
    total, levels = torch.zeros_like(x), x.new_zeros(x.shape[0], 1)
    for _ in range(order):
        left = x - total if mask is None else torch.where(mask, x - total, 0)
        mean = left.sum(dim=1, keepdim=True) / count
        off = left - mean if mask is None else torch.where(mask, left - mean, 0)
        magnitude = off.abs().sum(dim=1, keepdim=True) / count
        total = total + torch.where(off >= 0, mean + magnitude, mean - magnitude)
        levels = torch.cat([levels + (mean - magnitude), levels + (mean + magnitude)], dim=1)
    return (total if mask is None else torch.where(mask, total, 0)), levels


def split_block(weight: Float[Tensor, "o n"], diagonal: Float[Tensor, " n"], metric: Metric, search: Search) -> Split:
    """Salient columns and the split of the others, each the candidate of least squared error.

    `diagonal` is that of U, with UᵀU the inverse Hessian. Columns are ranked by the metric: |w|, or w² / U_jj². The
    errors are those of binarizing the metric itself (`search="metric"`, as released) or the weight (as the paper says).
    """
    scores = weight.abs() if metric == "magnitude" else (weight / diagonal).square()
    judged = weight if search == "weight" or metric == "magnitude" else scores
    ranked = torch.argsort(scores.abs().sum(dim=0), descending=True, stable=True)
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[ranked[: _salient_count(judged[:, ranked])]] = True
    outer = torch.zeros_like(weight, dtype=torch.bool)
    outer[:, ~salient] = _outer(judged[:, ~salient])
    return Split(salient, outer)


def _salient_count(ranked: Float[Tensor, "o n"]) -> int:
    """How many of the first columns to binarize apart; both parts are judged with two binarizations (released code)."""
    counts = range(1, min(MOST_SALIENT + 1, ranked.shape[1]))
    errors = [error_of_two(ranked[:, :k]) + error_of_two(ranked[:, k:]) for k in counts]
    return 1 + int(torch.stack(errors).argmin()) if errors else 0


def error_of_two(x: Float[Tensor, "o n"]) -> Float[Tensor, ""]:
    """The squared error of `binarize` with order 2, summed."""
    off = x - x.mean(dim=1, keepdim=True)
    left = off - torch.copysign(off.abs().mean(dim=1, keepdim=True), off)
    left -= left.mean(dim=1, keepdim=True)
    return left.square().sum() - x.shape[1] * left.abs().mean(dim=1).square().sum()


def _outer(x: Float[Tensor, "o n"]) -> Bool[Tensor, "o n"]:
    """The entries whose magnitude exceeds the split that makes two binarizations of one order err least."""
    size = x.abs()
    ordered = size.flatten().sort().values
    if not len(ordered):
        return torch.zeros_like(x, dtype=torch.bool)
    places = [(len(ordered) - 1) * (0.1 + 0.8 * step / (SPLITS - 1)) for step in range(SPLITS)]
    splits = ordered[torch.tensor(places, device=x.device).long()]
    return size > splits[split_errors(x, splits).argmin()]


def split_errors(x: Float[Tensor, "o n"], splits: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """The squared error of binarizing entries up to each split's magnitude, and those beyond it, row by row.

    In a sorted row both sets are intervals, so their sums are differences of running sums.
    """
    values = x.double().sort(dim=1).values
    start = values.new_zeros(x.shape[0], 1)
    sums = torch.cat([start, values.cumsum(dim=1)], dim=1)
    squares = torch.cat([start, values.square().cumsum(dim=1)], dim=1)
    ends = splits.double().expand(x.shape[0], -1).contiguous()
    below, above = torch.searchsorted(values, -ends), torch.searchsorted(values, ends, right=True)
    first, last = torch.zeros_like(below), torch.full_like(below, x.shape[1])
    parts = ([(below, above)], [(first, below), (above, last)])
    return sum((_interval_error(values, sums, squares, part) for part in parts), start=torch.zeros_like(ends)).sum(
        dim=0
    )


def _interval_error(
    values: Float[Tensor, "o n"],
    sums: Float[Tensor, "o m"],
    squares: Float[Tensor, "o m"],
    intervals: list[tuple[Int[Tensor, "o s"], Int[Tensor, "o s"]]],
) -> Float[Tensor, "o s"]:
    """Σ x² - n mean² - n magnitude² of the sorted values in some intervals of places together."""
    count = sum((stop - start for start, stop in intervals), start=torch.zeros_like(intervals[0][0])).clamp_min(1)
    total = sum((sums.gather(1, b) - sums.gather(1, a) for a, b in intervals), start=torch.zeros_like(count))
    power = sum((squares.gather(1, b) - squares.gather(1, a) for a, b in intervals), start=torch.zeros_like(count))
    mean = total / count
    place, off = torch.searchsorted(values, mean.contiguous()), torch.zeros_like(mean)
    for start, stop in intervals:
        middle = torch.minimum(torch.maximum(place, start), stop)
        off += sums.gather(1, stop) + sums.gather(1, start) - 2 * sums.gather(1, middle)
        off += mean * (2 * middle - start - stop)
    return power - count * (mean.square() + (off / count).square())


def block_levels(weight: Float[Tensor, "o n"], split: Split) -> tuple[Float[Tensor, "o n"], Float[Tensor, "o 2 4"]]:
    """What each entry of a block becomes by its class, and the levels of both classes, not salient first."""
    salient = split.salient.expand_as(weight)
    inner = ~salient & ~split.outer
    (near, low), (far, high) = binarize(weight, inner), binarize(weight, split.outer)
    twice, both = binarize(weight, salient, order=2)
    return near + far + twice, torch.stack([torch.cat([low, high], dim=1), both], dim=1)


@dataclass(frozen=True)
class _Blocks:
    """A rounder whose blocks are fitted when the sweep enters them."""

    size: int
    diagonal: Float[Tensor, " n"]
    settings: BinarySettings
    dtype: torch.dtype
    levels: list[Float[Tensor, "o 2 4"]] = field(default_factory=list)
    salient: list[Bool[Tensor, " n"]] = field(default_factory=list)
    values: list[Float[Tensor, "o n"]] = field(default_factory=list)

    def enter(self, start: int, current: Float[Tensor, "g o"]) -> None:
        """Choose classes, levels and values of the block that begins here."""
        weight = current.T
        diagonal = self.diagonal[start : start + weight.shape[1]]
        split = split_block(weight, diagonal, self.settings.metric, self.settings.search)
        values, levels = block_levels(weight, split)
        self.levels.append(levels.to(self.dtype).to(weight))
        self.salient.append(split.salient)
        if self.settings.assignment == "nearest":
            values = torch.stack([self.nearest(k, column) for k, column in enumerate(current)], dim=1)
        self.values.append(values.to(self.dtype).to(weight))

    def nearest(self, k: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """The nearest level for column k of the block that was entered last."""
        levels = self.levels[-1][:, int(self.salient[-1][k])]
        return levels.gather(1, (levels - column[:, None]).abs().argmin(dim=1, keepdim=True))[:, 0]

    def value(self, place: int, column: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """The block's value, whatever the column has become meanwhile, unless feedback is column by column."""
        k = place % self.size
        return self.nearest(k, column) if self.settings.feedback == "columns" else self.values[-1][:, k]


def round_binary(
    weight: Float[Tensor, "o i"],
    hessian: Float[Tensor, "i i"],
    spec: QuantSpec,
    damping: float,
    act_order: bool,
    settings: BinarySettings,
) -> tuple[QTensor, dict[str, float]]:
    """Codes of two bits over tables of four levels for each row, block of `spec` and class; notes with bit counts.

    `paper_bits` counts as the paper does: one bit a weight, two in salient columns, neither classes nor levels.

    Raises:
        NumericalError: the damped Hessian is not positive definite at any step of the ladder.
        ShapeError: the block size does not divide.
        SpecError: another format than nuq2:gN:dual, or a level does not fit into its storage dtype.
    """
    if (spec.kind, spec.bits, spec.dual, spec.group_along) != ("nuq", 2, True, "inputs"):
        raise SpecError(
            f"{spec}: binary weights are stored as nuq2:gN:dual, two classes of columns with four levels each"
        )
    columns = weight.shape[1]
    size = group_size(spec, columns)
    ordered = Ordered.of(weight, hessian, columns, damping, act_order)
    blocks = _Blocks(size, ordered.upper.diagonal(), settings, scale_dtype(spec))
    if settings.feedback == "diagonal":
        swept = _sweep_blocks(ordered, blocks, columns)
    else:
        swept = sweep(ordered, blocks, columns)
    salient, order = torch.cat(blocks.salient), ordered.order
    column_of = _cells(order, size, salient)
    grid = Codebook.of_levels(spec, torch.cat(blocks.levels, dim=1).float(), None, column_of)
    share = float(salient.double().mean())
    return quantize(ordered.restored(swept).float(), grid), ordered.notes | {"salient": share, "paper_bits": 1 + share}


def _cells(order: Int[Tensor, " i"], size: int, salient: Bool[Tensor, " i"]) -> Int[Tensor, " i"]:
    """The cell of each column: two a block, the second for salient columns."""
    column_of = torch.empty_like(order)
    column_of[order] = 2 * (torch.arange(len(order), device=order.device) // size) + salient.to(order)
    return column_of


def _sweep_blocks(ordered: Ordered, blocks: _Blocks, count: int) -> Float[Tensor, "o i"]:
    """Block after block, each error divided by its own diagonal only, as the released code feeds it back."""
    weight, upper, size = ordered.weight.clone(), ordered.upper, blocks.size
    for start in range(0, count, size):
        stop = start + size
        blocks.enter(start, weight[:, start:stop].T)
        errors = (weight[:, start:stop] - blocks.values[-1]) / upper.diagonal()[start:stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
        weight[:, start:stop] = blocks.values[-1]
    return weight
