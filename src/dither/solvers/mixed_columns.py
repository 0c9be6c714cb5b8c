"""Round column by column with bits of each column's own, few where an error is compensated or heard little.

Source: BAQ, arXiv 2506.05664, on top of GPTQ: a column's loss is Σ Δ² 4^-R / (24 U_jj²), with Δ the range of each row
and U the factor of GPTQ's sweep.
Departs from the released code: losses are of that formula, or of the weight rounded at each width, not those of a first
GPTQ run; a range may be fitted to the widths that were chosen.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dither.allocation.columns import equal_loss_bits, gain, levels_of_bits, losses_at, whole_bits
from dither.formats.fit import as_cells
from dither.formats.grid import column_index, grid_shape, group_size
from dither.formats.mixed import WIDEST, MixedGrid, fit_mixed
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import QuantSpec
from dither.solvers.columns import Ordered, sweep
from dither.solvers.rounders import OnTheWay, group_spec, on_grid

Losses = Literal["law", "measured"]
Steps = Literal["bits", "levels"]


@dataclass(frozen=True)
class ColumnBits:
    """How bits are given to columns: by which losses, as whole bits (of `allowed` widths) or as whole levels.

    `together` lets the columns of a group have one width; grids of `static` groups are those of the original weight,
    others are fitted when the sweep reaches the group.
    """

    losses: Losses = "law"
    steps: Steps = "bits"
    allowed: Collection[int] = tuple(range(WIDEST + 1))
    together: bool = False
    static: bool = False


def column_losses(weight: Float[Tensor, "o i"], diagonal: Float[Tensor, " i"], spec: QuantSpec) -> Float[Tensor, " i"]:
    """c_j of loss = c_j 4^-R_j: the squared range of column j's cells, summed over rows, over 24 U_jj²."""
    cells = as_cells(weight, spec)
    low, high = cells.amin(dim=1), cells.amax(dim=1)
    if spec.symmetry == "sym":
        width = 2 * torch.maximum(low.abs(), high.abs())
    elif spec.include_zero:
        width = high.clamp(min=0) - low.clamp(max=0)
    else:
        width = high - low
    rows, columns = weight.shape
    squares = width.square().reshape(grid_shape(spec, rows, columns)).sum(dim=0)
    place = column_index(spec, columns, weight.device)
    per_column = squares.expand(columns) if place is None else squares[place]
    if spec.granularity == "tensor":
        per_column = per_column * rows
    return per_column.to(diagonal) / (24 * diagonal.square())


def measured_losses(
    weight: Float[Tensor, "o i"], diagonal: Float[Tensor, " i"], spec: QuantSpec
) -> Float[Tensor, "i b"]:
    """Squared error over U_jj² of each column rounded to nearest at 0, 1, … 8 bits, in ranges of nominal width."""
    importance = diagonal.square().reciprocal()
    top = torch.full((weight.shape[1],), 2**spec.bits - 1, dtype=torch.uint8, device=weight.device)
    base = fit_mixed(weight, spec, top, importance).base
    table = [
        (MixedGrid(base, torch.full_like(top, 2**bits - 1)).round(weight) - weight).square().sum(dim=0)
        for bits in range(WIDEST + 1)
    ]
    return torch.stack(table, dim=1).double() * importance.double()[:, None]


def round_mixed(
    weight: Float[Tensor, "o i"],
    gram: Float[Tensor, "i i"],
    spec: QuantSpec,
    average: float,
    how: ColumnBits,
    damping: float,
    act_order: bool,
) -> tuple[QTensor, dict[str, float | str]]:
    """The weight in a mixed format, its columns of `average` bits, swept as GPTQ does, and notes.

    `weight` is in the Gram's dtype. Columns that never had an input have no bits.

    Raises:
        NumericalError: the damped Gram is not positive definite at any step of the ladder.
        ShapeError: a group size does not divide.
    """
    columns = weight.shape[1]
    ordered = Ordered.of(weight, gram, columns, damping, act_order)
    diagonal = ordered.upper.diagonal()[torch.argsort(ordered.order)]
    single, alive = weight.float(), gram.diagonal() > 0
    top, notes = column_tops(single, diagonal, alive, spec, average, how)
    importance = gram.diagonal().float()
    if how.static or spec.granularity != "group":
        grid = fit_mixed(single, spec, top, importance)
        swept = sweep(ordered, on_grid(grid, weight, ordered.order), columns)
        return quantize(ordered.restored(swept).float(), grid), {**ordered.notes, **notes}

    def fit(group: Float[Tensor, "o g"], index: Int[Tensor, " g"]) -> MixedGrid:
        return fit_mixed(group.float(), group_spec(spec), top[index], importance[index])

    on_the_way = OnTheWay.of(spec, ordered.order, fit)
    swept = sweep(ordered, on_the_way, columns)
    return quantize(ordered.restored(swept).float(), on_the_way.grid(spec)), {**ordered.notes, **notes}


def column_tops(
    weight: Float[Tensor, "o i"],
    diagonal: Float[Tensor, " i"],
    alive: Bool[Tensor, " i"],
    spec: QuantSpec,
    average: float,
    how: ColumnBits,
) -> tuple[UInt8[Tensor, " i"], dict[str, float | str]]:
    """The highest code of each column, and what the losses predict; uniform widths where others promise nothing."""
    size = group_size(spec, weight.shape[1]) if how.together else 1
    law = _grouped(column_losses(weight, diagonal, spec) * alive, size)
    if how.steps == "levels":
        bits = equal_loss_bits(law, average)
        top = levels_of_bits(bits).clamp(max=2**WIDEST) - 1
        return top.repeat_interleave(size).to(torch.uint8), {"predicted": gain(law, bits)}
    table = losses_at(law, WIDEST)
    if how.losses == "measured":
        table = _grouped(measured_losses(weight, diagonal, spec) * alive[:, None], size)
    total = round(average * len(table))
    chosen = whole_bits(table, total, how.allowed)
    uniform = whole_bits(table, total, {floor(average), ceil(average)})
    lost, before = (float(table.gather(1, bits[:, None]).sum()) for bits in (chosen, uniform))
    notes: dict[str, float | str] = {"predicted": lost / before if before > 0 else 1.0}
    if lost >= before:
        chosen, notes = uniform, {"widths": "uniform: others promise no smaller error"}
    return (2 ** chosen.repeat_interleave(size) - 1).to(torch.uint8), notes


def _grouped(losses: Float[Tensor, "i ..."], size: int) -> Float[Tensor, "g ..."]:
    grouped: Float[Tensor, "g ..."] = losses.reshape(-1, size, *losses.shape[1:]).sum(dim=1)
    return grouped
