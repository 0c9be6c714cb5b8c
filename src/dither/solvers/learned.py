"""What is learned of a weight on a uniform grid: a rounding offset for every entry, and the range of every cell.

With s and z of a cell, value = s * d, d = clamp(round(w / s + V), codes - z), where a real z is added before the
rounding and taken off again. Gradients pass the rounding as if it were not there, and stop where a code is clamped.

Source: SignRound (Cheng et al., arXiv 2309.05516), equations 1 to 3; the signed scale is the released code's.
Departs from the released code: the ends of a range that need not hold zero are scaled about its middle, since factors
of a narrow range far from zero would soon make its ends meet; a symmetric cell has one range factor (of its two only
the larger end's is ever used); ranges are factors of any grid given at the start, so that real zero-points and scales
of scales are learned as well; gradients are written out, since a graph of elementwise operations costs more than the
layers' own products.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import SpecError
from dither.formats.fit import grid_of_ranges
from dither.formats.grid import Grid, highest_code, lowest_code
from dither.formats.grid_packing import is_regrouped
from dither.formats.qtensor import QTensor
from dither.formats.spec import QuantSpec
from dither.solvers.descent import Descent, Rule

RangeGradient = Literal["straight", "codes"]
State = tuple[Tensor, ...]


@runtime_checkable
class Learned(Protocol):
    """A tensor that is learned by what it does to a block's output."""

    def value(self) -> Tensor:
        """The tensor as the block sees it now."""

    def step_(self, gradient: Tensor, rate: float) -> None:
        """Move what it is made of against the loss's gradient by `value`'s last result."""

    @property
    def state(self) -> State:
        """What is learned, copied."""

    def restore_(self, state: State) -> None:
        """Go back to an earlier state."""


@dataclass(frozen=True)
class Learning:
    """How a weight is learned: steps are `rate` times `offset_rate` in codes and `range_rate` in shares of a range.

    Offsets stay within ±`reach`, range factors between 0 and `widest`. The gradient of a range goes "straight" through
    the rounding as the paper's, or takes the "codes" as they are.
    """

    rule: Rule = "sign"
    offset_rate: float = 1.0
    range_rate: float = 1.0
    reach: float = 0.5
    widest: float = 1.0
    range_gradient: RangeGradient = "straight"


class LearnedTensor:
    """A tensor that is learned as it is, by steps in units of its root mean square at the start."""

    def __init__(self, start: Tensor, rule: Rule, rate: float) -> None:
        """`rate` is in units of the schedule's."""
        self._tensor, self._descent = start.detach().float().clone(), Descent(rule)
        self._rate = rate * float(self._tensor.square().mean().sqrt())

    def value(self) -> Tensor:
        """A copy of it."""
        return self._tensor.clone()

    def step_(self, gradient: Tensor, rate: float) -> None:
        """One step."""
        self._descent.step_(self._tensor, gradient.float(), rate * self._rate)

    @property
    def state(self) -> State:
        """It."""
        return (self._tensor.clone(),)

    def restore_(self, state: State) -> None:
        """Go back."""
        self._tensor.copy_(state[0])


class LearnedGrid:
    """A weight [o, i] on a uniform grid whose offsets and ranges are learned from a start.

    At the start the value is that of `grid.round(weight)`.
    """

    def __init__(self, weight: Float[Tensor, "o i"], grid: Grid, learning: Learning) -> None:
        """The start; `weight` may differ from the layer's own, as GPTQ's compensated one does.

        Raises:
            SpecError: a dual grid, whose two sets of columns differ in size.
        """
        if grid.spec.dual:
            raise SpecError(f"{grid.spec}: ranges are learned of cells of one size; leave out dual")
        order = (
            torch.argsort(grid.column_of, stable=True) if is_regrouped(grid) and grid.column_of is not None else None
        )
        self._order, self._back = order, None if order is None else torch.argsort(order)
        self.spec, self.shape, self.learning, self._start = grid.spec, weight.shape, learning, grid
        self._flipped = self.spec.granularity == "group" and self.spec.group_along == "outputs"
        self._weight = self._cells(weight.float())
        self._offset = torch.zeros_like(self._weight)
        top, scale = highest_code(self.spec), grid.scale.float()
        self._sign = scale.sign() if bool((scale < 0).any()) else None
        low, high = -grid.zero_point * scale, (top - grid.zero_point) * scale
        # a range that need not hold zero may be narrow and far from it: its ends then move about its own middle
        self._middle = torch.zeros_like(low) if self.spec.include_zero else (low + high) / 2
        self._low, self._high = low - self._middle, high - self._middle
        self._ends = [torch.ones_like(scale) for _ in range(2 if self.spec.symmetry == "asym" else 1)]
        self._descents = [Descent(learning.rule) for _ in range(3)]
        self._grid, self._steps, self._inside = grid, torch.empty(0), torch.empty(0, dtype=torch.bool)

    def value(self) -> Float[Tensor, "o i"]:
        """The weight on the grid of the ranges as they are now."""
        self._grid = self._fitted()
        scale, zero_point = self._per_cell(self._grid.scale), self._per_cell(self._grid.zero_point)
        steps = torch.div(self._weight, scale).add_(self._offset)
        if self.spec.zero_point == "real" or self.spec.bits == 1:
            steps.add_(zero_point).round_().sub_(zero_point)
        else:
            steps.round_()
        lowest, highest = lowest_code(self.spec) - zero_point, highest_code(self.spec) - zero_point
        self._steps = torch.clamp(steps, lowest, highest)
        self._inside = self._steps == steps
        return self._matrix(self._steps * scale)

    def step_(self, gradient: Float[Tensor, "o i"], rate: float) -> None:
        """One step of all offsets and ranges."""
        gradient, how = self._cells(gradient), self.learning
        scale = self._per_cell(self._grid.scale)
        if how.range_rate and self.spec.kind != "mxint":  # whose scales are the largest entry's exponent
            self._step_ranges(gradient, scale, rate * how.range_rate)
        along = torch.mul(gradient, scale).mul_(self._inside)
        self._descents[2].step_(self._offset, along, rate * how.offset_rate)
        self._offset.clamp_(-how.reach, how.reach)

    def _step_ranges(self, gradient: Tensor, scale: Tensor, rate: float) -> None:
        if self.learning.range_gradient == "straight":
            free = torch.div(self._weight, scale).mul_(self._inside)
            by_scale = torch.sub(self._steps, free, out=free).mul_(gradient).sum(dim=2)
            by_zero = (gradient * ~self._inside).sum(dim=2)
        else:
            by_scale, by_zero = (self._steps * gradient).sum(dim=2), gradient.sum(dim=2)
        by_scale, by_zero = (self._per_grid(part) for part in (by_scale, by_zero))
        for end, slope, descent in zip(self._ends, self._slopes(by_scale, by_zero), self._descents[:2], strict=False):
            descent.step_(end, slope, rate)
            end.clamp_(0, self.learning.widest)

    def _slopes(self, by_scale: Tensor, by_zero: Tensor) -> list[Tensor]:
        """Of the loss by the factor of each end, from the slopes by scale and by -scale * zero-point."""
        scale, top = self._grid.scale, highest_code(self.spec)
        if len(self._ends) == 1:
            return [by_scale * self._start.scale]
        low = self._middle + self._low * self._ends[0]
        lift = low / (scale * top)  # scale * zero_point = -low, and the clamped codes move with it
        return [
            (-by_scale / top + by_zero * (1 + lift)) * self._low,
            (by_scale / top - by_zero * lift) * self._high,
        ]

    def _fitted(self) -> Grid:
        start, spec = self._start, self.spec
        if len(self._ends) == 2:
            low, high = (self._middle + end * by for end, by in zip((self._low, self._high), self._ends, strict=True))
            return grid_of_ranges(low, high, spec, start.row_of, start.column_of)
        largest = start.scale.abs() * self._ends[0] * symmetric_steps(spec)
        grid = grid_of_ranges(-largest, largest, spec, start.row_of, start.column_of)
        return grid if self._sign is None else replace(grid, scale=grid.scale * self._sign)

    @property
    def state(self) -> State:
        """Offsets and range factors."""
        return tuple(part.clone() for part in (self._offset, *self._ends))

    def restore_(self, state: State) -> None:
        """Go back."""
        for part, earlier in zip((self._offset, *self._ends), state, strict=True):
            part.copy_(earlier)

    def stored(self) -> QTensor:
        """Codes and grid as they are now."""
        self.value()
        codes = self._matrix(self._steps + self._per_cell(self._grid.zero_point)).round_()
        return QTensor(codes.to(torch.uint8), self._grid)

    def _cells(self, matrix: Float[Tensor, "o i"]) -> Float[Tensor, "n c m"]:
        """The entries of each cell side by side."""
        rows = matrix.T if self._flipped else matrix if self._order is None else matrix[:, self._order]
        if self.spec.granularity == "tensor":
            return rows.reshape(1, 1, -1)
        return rows.reshape(rows.shape[0], -1, self.spec.group_size or rows.shape[1])

    def _matrix(self, cells: Float[Tensor, "n c m"]) -> Float[Tensor, "o i"]:
        if self._flipped:
            return cells.reshape(self.shape[::-1]).T.contiguous()
        matrix = cells.reshape(self.shape)
        return matrix if self._back is None else matrix[:, self._back]

    def _per_cell(self, part: Float[Tensor, "R C"]) -> Float[Tensor, "n c 1"]:
        return (part.T if self._flipped else part)[..., None]

    def _per_grid(self, part: Float[Tensor, "n c"]) -> Float[Tensor, "R C"]:
        return part.T if self._flipped else part


def symmetric_steps(spec: QuantSpec) -> float:
    """Steps between zero and the larger end of a symmetric (or unsigned) grid, as `affine` counts them."""
    if spec.symmetry == "unsigned":
        return float(highest_code(spec))
    return (highest_code(spec) - spec.narrow) / 2
