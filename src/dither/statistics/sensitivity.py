"""What the loss says about a layer's weight, for methods that ask it before they round."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from dither.statistics.output_rows import OutputRows


@dataclass(frozen=True)
class Sensitivity:
    """How much entries matter, how pairs of columns do, which are to be kept, and how outputs weigh; any of the four.

    Their size has no meaning, only their ratios within a layer have.
    """

    fisher: Float[Tensor, "o i"] | None = None
    hessian: Float[Tensor, "i i"] | None = None
    kept: Bool[Tensor, "o i"] | None = None
    rows: OutputRows | None = None
