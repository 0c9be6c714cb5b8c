"""What is learned of a weight on a codebook: a rounding offset for every entry, scales, and the levels themselves.

value = scale * levels[code], code the nearest level to w / scale + V * spacing, with `spacing` a cell's mean distance
of levels. Gradients pass the rounding to V as if it were not there, and stop beyond the end levels; levels and scales
move with the codes as they are.

Source: the offsets of SignRound (arXiv 2309.05516) on the formats of SqueezeLLM (arXiv 2306.07629) and QLoRA (arXiv
2305.14314) [choice]: neither combines them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.formats.codebook import Codebook
from dither.formats.qtensor import QTensor
from dither.formats.ranges import stored_scale
from dither.formats.second_level import SecondLevel
from dither.solvers.descent import Descent
from dither.solvers.learned import Learning, State


class LearnedCodebook:
    """A weight [o, i] on levels; where they are fixed (nf4, fp4) scales are learned, else (nuq) the levels.

    At the start the value is that of `codebook.round(weight)`. `learning.range_rate` is in shares of a scale, or of a
    spacing; `widest` bounds scales.
    """

    def __init__(self, weight: Float[Tensor, "o i"], codebook: Codebook, learning: Learning) -> None:
        """The start."""
        self._weight, self._start, self.learning = weight.float(), codebook, learning
        self._fixed = codebook.spec.kind != "nuq"
        levels = codebook.levels.float()
        self._spacing = (levels[:, :, -1:] - levels[:, :, :1]) / max(levels.shape[2] - 1, 1)
        self._offset = torch.zeros_like(self._weight)
        self._moved = torch.ones_like(codebook.scale) if self._fixed else torch.zeros_like(levels)
        self._descents = Descent(learning.rule), Descent(learning.rule)
        self._codebook, self._codes = codebook, torch.empty(0)

    def value(self) -> Float[Tensor, "o i"]:
        """The weight on the levels as they are now."""
        book = self._codebook = self._fitted()
        self._codes = book.encode(self._weight + self._offset * self._unit(book))
        return book.decode(self._codes)

    def step_(self, gradient: Float[Tensor, "o i"], rate: float) -> None:
        """One step of all offsets, and of scales or levels."""
        book, how = self._codebook, self.learning
        unit = self._unit(book)
        wanted = self._weight + self._offset * unit
        top = torch.full_like(self._codes, book.levels.shape[2] - 1)
        ends = book.decode(torch.zeros_like(top)) - unit / 2, book.decode(top) + unit / 2
        self._descents[0].step_(
            self._offset, gradient * unit * ((wanted >= ends[0]) & (wanted <= ends[1])), rate * how.offset_rate
        )
        self._offset.clamp_(-how.reach, how.reach)
        if how.range_rate:
            self._step_book(gradient, rate * how.range_rate)

    def _step_book(self, gradient: Float[Tensor, "o i"], rate: float) -> None:
        book = self._codebook
        if self._fixed:
            along = gradient * book.decode(self._codes)
            self._descents[1].step_(self._moved, self._summed(along[:, :, None], self._moved.shape)[:, :, 0], rate)
            self._moved.clamp_(0, self.learning.widest)
            return
        chosen = torch.nn.functional.one_hot(self._codes.long(), book.levels.shape[2])
        self._descents[1].step_(self._moved, self._summed(gradient[:, :, None] * chosen, self._moved.shape), rate)
        levels = (self._start.levels + self._moved * self._spacing).sort(dim=2).values  # none overtakes another
        self._moved = (levels - self._start.levels) / self._spacing.clamp_min(torch.finfo(levels.dtype).tiny)

    def _summed(self, parts: Float[Tensor, "o i k"], shape: torch.Size) -> Float[Tensor, "R C k"]:
        """Sums over the entries of each cell."""
        place = self._places(parts.shape[0], parts.shape[1], shape)
        out = parts.new_zeros(shape[0] * shape[1], parts.shape[2])
        return out.index_add_(0, place.flatten(), parts.flatten(0, 1)).reshape(*shape[:2], -1)

    def _places(self, rows: int, columns: int, shape: torch.Size) -> Int[Tensor, "o i"]:
        """The cell of every entry, of [R, C] numbered row by row."""
        start, device = self._start, self._weight.device
        row = torch.arange(rows, device=device) if start.row_of is None else start.row_of.long()
        column = torch.arange(columns, device=device) if start.column_of is None else start.column_of.long()
        row = row if shape[0] > 1 else torch.zeros_like(row)
        column = column if shape[1] > 1 else torch.zeros_like(column)
        return row[:, None] * shape[1] + column

    def _unit(self, book: Codebook) -> Float[Tensor, "..."]:
        """The spacing at every entry, in units of the weight."""
        rows, columns = self._weight.shape
        spacing = self._spacing[:, :, 0].flatten()[self._places(rows, columns, self._spacing.shape)]
        return spacing * book.scale.flatten()[self._places(rows, columns, book.scale.shape)]

    def _fitted(self) -> Codebook:
        start = self._start
        if self._fixed:
            scale = start.scale * self._moved
            if start.spec.second_level is None:
                return Codebook.of_scale(start.spec, stored_scale(scale, start.spec), start.row_of, start.column_of)
            second = SecondLevel.of(scale, *start.spec.second_level, positive=True)
            return Codebook.of_scale(start.spec, second.decode(), start.row_of, start.column_of, second)
        levels = start.levels + self._moved * self._spacing
        return Codebook.of_levels(start.spec, levels, start.row_of, start.column_of)

    @property
    def state(self) -> State:
        """Offsets, and factors of scales or shifts of levels."""
        return self._offset.clone(), self._moved.clone()

    def restore_(self, state: State) -> None:
        """Go back."""
        self._offset.copy_(state[0])
        self._moved.copy_(state[1])

    def stored(self) -> QTensor:
        """Codes and codebook as they are now."""
        self.value()
        return QTensor(self._codes.to(torch.uint8), self._codebook)
