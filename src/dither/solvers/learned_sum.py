"""What is learned of a weight whose codes are only a part of it: outliers are kept apart, or a low-rank term is added.

Source: the parts are those of SpQR (arXiv 2306.03078) and LoRC (arXiv 2303.08302); learning under
them is ours [choice].
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dither.formats.low_rank import LowRank
from dither.formats.qtensor import QTensor
from dither.formats.sparse import Sparse
from dither.solvers.learned import LearnedGrid, State
from dither.solvers.learned_codebook import LearnedCodebook


class LearnedSum:
    """Codes that are learned, plus what stays as it is: a low-rank term, and `kept` entries of `weight`.

    `coded` stands for the weight without the low-rank term; what it makes of kept entries has no effect.
    """

    def __init__(
        self,
        weight: Float[Tensor, "o i"],
        coded: LearnedGrid | LearnedCodebook,
        kept: Bool[Tensor, "o i"] | None = None,
        low_rank: LowRank | None = None,
    ) -> None:
        """The start is that of `coded`."""
        self._weight, self._coded, self._kept, self._low_rank = weight.float(), coded, kept, low_rank
        self._added = None if low_rank is None else low_rank.dense()

    def value(self) -> Float[Tensor, "o i"]:
        """The whole weight as it is now."""
        value = self._coded.value()
        value = value if self._added is None else value + self._added
        return value if self._kept is None else torch.where(self._kept, self._weight, value)

    def step_(self, gradient: Float[Tensor, "o i"], rate: float) -> None:
        """One step of the codes."""
        self._coded.step_(gradient if self._kept is None else gradient.masked_fill(self._kept, 0), rate)

    @property
    def state(self) -> State:
        """That of the codes."""
        return self._coded.state

    def restore_(self, state: State) -> None:
        """Go back."""
        self._coded.restore_(state)

    def stored(self) -> QTensor:
        """Codes, outliers and correction; a kept entry comes back to float16 precision of what its code lacks."""
        stored = replace(self._coded.stored(), low_rank=self._low_rank)
        if self._kept is None:
            return stored
        return replace(stored, sparse=Sparse.of(self._weight - stored.dequantize(), self._kept))
