"""Codebooks: real = scale * levels[code], with levels that rise but need not be evenly spaced.

Fixed levels: nf4 (QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314, appendix E: quantiles of a normal
distribution) and fp4 (the four-bit float of bitsandbytes: sign, two exponent bits, one of mantissa, and a subnormal of
1/192). Fitted levels: nuq, a table for each row, or for each row and column cell (SqueezeLLM, arXiv 2306.07629).

A code is the rank of its level, from the lowest up [choice]; bitsandbytes numbers fp4 by its bits.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dither.errors import ShapeError, SpecError
from dither.formats.grid import EVERY, Columns, RoundMode
from dither.formats.second_level import SecondLevel
from dither.formats.spec import QuantSpec

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(sign * x / 12 for sign, x in [(-1, x) for x in (12, 8, 6, 4, 3, 2, 0.0625, 0)])
_FP4 += tuple(x / 12 for x in (0, 0.0625, 2, 3, 4, 6, 8, 12))
FIXED_LEVELS = {"nf": _NF4, "fp": _FP4}


@dataclass(frozen=True)
class Codebook:
    """Levels of an [o, i] matrix: `levels` [R, C, L] rise along L, `scale` is [R, C]; either may have sizes of one.

    Row o uses row `row_of[o]`, column i column `column_of[i]`; None means row o uses row o (or the only one), and
    likewise for columns.
    """

    spec: QuantSpec
    levels: Float[Tensor, "R C L"]
    scale: Float[Tensor, "R2 C2"]
    row_of: Int[Tensor, " o"] | None = None
    column_of: Int[Tensor, " i"] | None = None
    scale_codes: SecondLevel | None = None  # what `scale` decodes from where the spec says sB.G

    @classmethod
    def of_levels(
        cls,
        spec: QuantSpec,
        levels: Float[Tensor, "R C L"],
        row_of: Int[Tensor, " o"] | None = None,
        column_of: Int[Tensor, " i"] | None = None,
    ) -> "Codebook":
        """Fitted levels in any order, sorted here and rounded to the storage dtype; scales are ones.

        Raises:
            ShapeError: there is not one level for each code.
        """
        if levels.shape[2] != spec.levels:
            raise ShapeError(f"{spec} has {spec.levels} levels a cell, got {levels.shape[2]}")
        stored = levels.to(getattr(torch, spec.scale_dtype)).float().sort(dim=2).values
        if not bool(stored.isfinite().all()):
            raise SpecError(f"{spec}: a level of {float(levels.abs().amax()):.4g} does not fit into {spec.scale_dtype}")
        return cls(spec, stored, torch.ones_like(stored[:, :, 0]), row_of, column_of)

    @classmethod
    def of_scale(
        cls,
        spec: QuantSpec,
        scale: Float[Tensor, "R C"],
        row_of: Int[Tensor, " o"] | None = None,
        column_of: Int[Tensor, " i"] | None = None,
        scale_codes: SecondLevel | None = None,
    ) -> "Codebook":
        """The fixed levels of nf4 or fp4 with these scales."""
        levels = torch.tensor(FIXED_LEVELS[spec.kind], dtype=torch.float32, device=scale.device)
        return cls(spec, levels[None, None], scale, row_of, column_of, scale_codes)

    def encode(self, x: Float[Tensor, "o n"], columns: Columns = EVERY, mode: RoundMode = "nearest") -> Tensor:
        """Codes (as floats) of the given columns; halfway between two levels the lower one is nearest."""
        levels, steps = self.levels.to(x), x / self._scale(columns).to(x)
        ends = levels if mode != "nearest" else (levels[:, :, 1:] + levels[:, :, :-1]) / 2
        codes, cells = torch.empty_like(x), self._cells(x.shape[1], columns)
        for cell in cells.unique().tolist():
            chosen = (cells == cell).nonzero()[:, 0]
            edges = ends[:, cell] if self.row_of is None or len(ends) == 1 else ends[self.row_of, cell]
            edges = edges.expand(x.shape[0], -1).contiguous()
            codes[:, chosen] = torch.searchsorted(edges, steps[:, chosen].contiguous(), right=mode == "floor").to(x)
        return codes.sub_(1 if mode == "floor" else 0).clamp_(0, levels.shape[2] - 1)

    def decode(self, codes: Float[Tensor, "o n"], columns: Columns = EVERY) -> Float[Tensor, "o n"]:
        """Values of codes in the given columns."""
        count = self.levels.shape[2]
        row = torch.arange(codes.shape[0], device=codes.device) if self.row_of is None else self.row_of
        row = row if self.levels.shape[0] > 1 else torch.zeros_like(row)
        place = row[:, None] * self.levels.shape[1] + self._cells(codes.shape[1], columns)
        chosen = self.levels.to(codes).flatten()[place * count + codes.long()]
        return chosen * self._scale(columns).to(codes)

    def round(
        self, x: Float[Tensor, "o n"], columns: Columns = EVERY, mode: RoundMode = "nearest"
    ) -> Float[Tensor, "o n"]:
        """The level that `mode` chooses for each entry; beyond the ends, the end."""
        return self.decode(self.encode(x, columns, mode), columns)

    def codes(self, x: Float[Tensor, "o i"]) -> UInt8[Tensor, "o i"]:
        """Nearest codes of the whole matrix, ready for packing."""
        return self.encode(x).to(torch.uint8)

    def _scale(self, columns: Columns) -> Float[Tensor, "..."]:
        scale = self.scale
        if self.column_of is not None and scale.shape[1] > 1:
            scale = scale[:, self.column_of[columns]]
        elif scale.shape[1] > 1:
            scale = scale[:, columns]
        return scale if self.row_of is None or scale.shape[0] == 1 else scale[self.row_of]

    def _cells(self, count: int, columns: Columns) -> Int[Tensor, " n"]:
        """The column of `levels` that each of the given columns uses."""
        if self.levels.shape[1] == 1:
            return torch.zeros(count, dtype=torch.long, device=self.levels.device)
        if self.column_of is not None:
            return self.column_of[columns].long()
        return torch.arange(self.levels.shape[1], device=self.levels.device)[columns]
