"""Grids whose columns have widths of their own: one range a cell, from which each column's steps follow.

What is stored of a column is its highest code t, one byte; its codes take as many bits as t has, from none (the column
is zero) to 8. Scale s and zero-point z of a cell are those of the format's nominal bits B, where t = 2^B - 1 = T. Few
codes best span less of a distribution than many do, so the range of a column is the cell's times R(t) / R(T) about its
middle, with R the span of the best uniform quantizer of a normal distribution (Max, Quantizing for Minimum Distortion,
1960, table II; linear in log2(t + 1) between whole bits). This costs no storage. Measured on layers of SmolLM2-135M at
2 and 3 bits: columns that share one range lose all that their different widths gain.

real = scale * (code - zero), scale = s (T / t) (R(t) / R(T)); asym: zero = t / 2 - (T / 2 - z) s / scale; sym: zero =
(t + 1) // 2, and between the two codes for one bit.
"""

from dataclasses import dataclass
from functools import cache
from math import log2

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dither.errors import ShapeError, SpecError
from dither.formats.fit import as_cells, grid_of_ranges
from dither.formats.grid import (
    EVERY,
    Columns,
    Grid,
    RoundMode,
    column_index,
    decode,
    grid_shape,
    highest_code,
    rounded,
    row_index,
)
from dither.formats.packing import pack, packed_width, unpack
from dither.formats.spec import QuantSpec

WIDEST = 8
SPANS = (0.0, 1.596, 2.987, 4.102, 5.028, 5.831, 6.558, 7.226, 7.854)  # in standard deviations, of 2^b levels
SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of a cell's range, where `mse` looks for least error
TURNS = 6  # of codes and straight lines through them, from the best of those on


@dataclass(frozen=True)
class MixedGrid:
    """A uniform grid at nominal bits, and the highest code of each column; 0 makes a column zero."""

    base: Grid
    top: UInt8[Tensor, " i"]

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        return self.base.spec

    def cells(self, columns: Columns = EVERY) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Scale and zero-point of the given columns, broadcastable against [o, n]; a scale of 0 where all is zero."""
        scale, zero_point = self.base.cells(columns)
        top, whole = self.top[columns], highest_code(self.spec)
        factor = torch.tensor(step_ratios(whole), dtype=scale.dtype, device=scale.device)[top.long()]
        steps, top = scale * factor, top.to(scale)
        if self.spec.symmetry == "asym":
            inverse = torch.where(factor > 0, 1 / torch.where(factor > 0, factor, torch.ones_like(factor)), 0.0)
            return steps, top / 2 - (whole / 2 - zero_point) * inverse
        return steps, torch.where(top == 1, torch.full_like(top, 0.5), torch.floor((top + 1) / 2))

    def encode(self, x: Float[Tensor, "o n"], columns: Columns = EVERY, mode: RoundMode = "nearest") -> Tensor:
        """Codes (as floats) of the given columns of the matrix."""
        scale, zero_point = (part.to(x) for part in self.cells(columns))
        steps = x / torch.where(scale > 0, scale, torch.ones_like(scale))
        top = self.top[columns].to(x)
        return torch.minimum(rounded(steps + zero_point, mode).clamp_(min=0), top)

    def decode(self, codes: Float[Tensor, "o n"], columns: Columns = EVERY) -> Float[Tensor, "o n"]:
        """Values of codes in the given columns."""
        scale, zero_point = self.cells(columns)
        return decode(codes, scale.to(codes), zero_point.to(codes))

    def round(
        self, x: Float[Tensor, "o n"], columns: Columns = EVERY, mode: RoundMode = "nearest"
    ) -> Float[Tensor, "o n"]:
        """The value on the grid that `mode` chooses for each entry."""
        return self.decode(self.encode(x, columns, mode), columns)

    def codes(self, x: Float[Tensor, "o i"]) -> UInt8[Tensor, "o i"]:
        """Nearest codes of the whole matrix, ready for packing."""
        return self.encode(x).to(torch.uint8)


@cache
def step_ratios(whole: int) -> tuple[float, ...]:
    """The step of a column of each highest code 0 … 255 over that of the highest code `whole`; 0 for no codes."""
    spans = [_span(top) for top in range(2**WIDEST)]
    return (0.0, *(whole / top * spans[top] / spans[whole] for top in range(1, 2**WIDEST)))


def _span(top: int) -> float:
    bits = log2(top + 1)
    below = min(int(bits), WIDEST - 1)
    return SPANS[below] + (bits - below) * (SPANS[below + 1] - SPANS[below])


def widths_of(top: UInt8[Tensor, " i"]) -> Int[Tensor, " i"]:
    """Bits that the codes up to `top` take: 0 for 0, 1 for 1, 2 for 2 and 3, up to 8."""
    return torch.frexp(top.float()).exponent.long()  # exact, which a logarithm is not


def count_widths(top: UInt8[Tensor, " i"]) -> tuple[int, ...]:
    """How many columns have 0, 1, … 8 bits."""
    return tuple(torch.bincount(widths_of(top), minlength=WIDEST + 1).tolist())


def pack_columns(codes: UInt8[Tensor, "o i"], top: UInt8[Tensor, " i"]) -> UInt8[Tensor, "o bytes"]:
    """Codes of the columns of each width together, the narrowest first; each width begins on a byte of its own.

    Raises:
        ShapeError: a code is beyond its column's highest.
    """
    if bool((codes > top).any()):
        raise ShapeError("packing columns: a code is beyond the highest of its column")
    widths = widths_of(top)
    parts = [pack(codes[:, widths == bits], bits) for bits in range(1, WIDEST + 1) if bool((widths == bits).any())]
    return torch.cat(parts, dim=1) if parts else codes[:, :0]


def unpack_columns(
    packed: UInt8[Tensor, "o bytes"], top: UInt8[Tensor, " i"], counts: tuple[int, ...]
) -> UInt8[Tensor, "o i"]:
    """The inverse of `pack_columns`.

    Raises:
        ShapeError: the columns' widths are not as many of each as `counts` says.
    """
    if count_widths(top) != counts:
        raise ShapeError(f"columns of 0 to 8 bits: expected {counts}, got {count_widths(top)}")
    codes, widths, start = packed.new_zeros(packed.shape[0], top.shape[0]), widths_of(top), 0
    for bits in (bits for bits in range(1, WIDEST + 1) if counts[bits]):
        stop = start + packed_width(counts[bits], bits)
        codes[:, widths == bits] = unpack(packed[:, start:stop].contiguous(), bits, counts[bits])
        start = stop
    return codes


def fit_mixed(
    weight: Float[Tensor, "o i"],
    spec: QuantSpec,
    top: UInt8[Tensor, " i"],
    importance: Float[Tensor, " i"] | None = None,
) -> MixedGrid:
    """The grid of columns with these highest codes: ranges as extremes (`minmax`) or of least squared error (`mse`).

    `importance` weighs the error in each column. Columns of no bits do not stretch a range.

    Raises:
        SpecError: another kind of format, or a scale or zero-point too large for its storage.
        ShapeError: a group size does not divide.
    """
    if spec.kind != "mix":
        raise SpecError(f"{spec}: columns of different widths need a mixed format, such as mix{spec.bits}")
    shape, live = grid_shape(spec, *weight.shape), as_cells((top > 0).to(weight).expand_as(weight), spec) > 0
    cells = as_cells(weight, spec)
    high = torch.where(live, cells, -torch.inf).amax(dim=1).reshape(shape)
    low = torch.where(live, cells, torch.inf).amin(dim=1).reshape(shape)
    empty = torch.isinf(low)
    low, high = (torch.where(empty, torch.zeros_like(part), part) for part in (low, high))
    weigh = weight.new_ones(weight.shape[1]) if importance is None else importance.to(weight)
    weigh = weigh / weigh.amax().clamp_min(torch.finfo(weight.dtype).tiny)
    search = _Search(weight, spec, top, weigh, (low, high))
    for shrink in SHRINKS if spec.search == "mse" else ():
        search.try_range(*_narrowed(low, high, shrink, spec))
    for _ in range(TURNS if spec.search == "mse" and spec.symmetry == "asym" else 0):
        search.try_range(*search.line())
    return search.grid(*search.found)


class _Search:
    """The best range of each cell so far."""

    def __init__(
        self, weight: Float[Tensor, "o i"], spec: QuantSpec, top: UInt8[Tensor, " i"], weigh: Float[Tensor, " i"],
        found: tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]],
    ) -> None:  # fmt: skip
        self.weight, self.spec, self.top, self.weigh, self.found = weight, spec, top, weigh, found
        self.best = torch.full_like(found[0], torch.inf)
        rows, columns = weight.shape
        self.place = row_index(spec, rows, weight.device), column_index(spec, columns, weight.device)

    def grid(self, low: Float[Tensor, "R C"], high: Float[Tensor, "R C"]) -> MixedGrid:
        """Of these ranges."""
        return MixedGrid(grid_of_ranges(low, high, self.spec, *self.place), self.top)

    def try_range(self, low: Float[Tensor, "R C"], high: Float[Tensor, "R C"]) -> None:
        """Keep what errs less, cell by cell."""
        error = (self.grid(low, high).round(self.weight) - self.weight).square_()
        total = self.sums(error)
        better = total < self.best
        self.best = torch.where(better, total, self.best)
        self.found = torch.where(better, low, self.found[0]), torch.where(better, high, self.found[1])

    def line(self) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
        """The ranges that least squares give for the codes of the best: weight = low + width * part of the range."""
        whole, top = highest_code(self.spec), self.top.to(self.weight)
        ratio = torch.tensor(step_ratios(whole)).to(top)[self.top.long()] / whole
        part = 0.5 + (self.grid(*self.found).encode(self.weight) - top / 2) * ratio
        live = (self.top > 0).to(part).expand_as(part)
        total = self.sums(live).clamp_min(torch.finfo(part.dtype).tiny)
        mean, value = self.sums(live * part) / total, self.sums(live * self.weight) / total
        spread = self.sums(live * part.square()) / total - mean.square()
        together = self.sums(live * part * self.weight) / total - mean * value
        low, high = self.found
        fitted = (spread > 1e-6) & (together > 0)
        width = torch.where(fitted, together / spread.clamp_min(1e-6), high - low)
        start = value - width * mean
        return torch.where(fitted, start, low), torch.where(fitted, start + width, high)

    def sums(self, values: Float[Tensor, "o i"]) -> Float[Tensor, "R C"]:
        """Of each cell, weighed by column."""
        return as_cells(values * self.weigh, self.spec).sum(dim=1).reshape(self.found[0].shape)


def _narrowed(
    low: Float[Tensor, "R C"], high: Float[Tensor, "R C"], shrink: float, spec: QuantSpec
) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
    """A range of `shrink` times the width: about its middle, or about zero where it has to hold zero."""
    if spec.symmetry == "sym" or spec.include_zero:
        return low * shrink, high * shrink
    middle, half = (low + high) / 2, (high - low) / 2
    return middle - half * shrink, middle + half * shrink
