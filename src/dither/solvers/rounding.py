"""The rounding under a method that is about something else: to nearest, or column by column as in GPTQ."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from dither.formats.codebook import Codebook
from dither.formats.grid import Grid
from dither.formats.mixed import MixedGrid
from dither.formats.qtensor import QTensor, quantize
from dither.solvers.columns import round_by_columns

Rounding = Literal["nearest", "columns"]


def round_weight(
    weight: Float[Tensor, "o i"],
    gram: Float[Tensor, "i i"] | None,
    grid: Grid | Codebook | MixedGrid,
    rounding: Rounding,
    damping: float,
    act_order: bool = True,
) -> tuple[QTensor, dict[str, Any]]:
    """Codes of a weight and what the solver noted; without a Gram (grouped convolution) the nearest, which is noted.

    `damping` is in units of the Gram's mean diagonal; nearest rounding needs neither it nor the Gram.

    Raises:
        NumericalError: the damped Gram is not positive definite at any step of the ladder.
    """
    if rounding == "nearest":
        return quantize(weight, grid), {}
    if gram is None:
        return quantize(weight, grid), {"rounding": "nearest: grouped convolution"}
    rounded = round_by_columns(weight.to(gram), gram, grid, weight.shape[1], damping, act_order)
    return quantize(rounded.weight.float(), grid), dict(rounded.notes)
