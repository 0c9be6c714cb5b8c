"""A few rows of a layer's inputs, with what each value of its output weighs in the loss.

Scale searches that look at a layer's output need inputs and weighing row by row, which a Gram has summed up.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.base import as_rows
from dither.statistics.extremes import MinMax


@dataclass(frozen=True)
class OutputRows:
    """Inputs [n, i], the weighing of each output value [n, o] (None: all alike) and the extremes of all inputs seen.

    Only ratios of the weighing within a layer have a meaning.
    """

    inputs: Float[Tensor, "n i"]
    weighing: Float[Tensor, "n o"] | None
    extremes: MinMax

    @classmethod
    def of(
        cls, x: Float[Tensor, "*b i"], gradient: Float[Tensor, "*b o"], rows: int, generator: torch.Generator
    ) -> "OutputRows":
        """At most `rows` rows of one pass, drawn by `generator`, weighed by the squared gradient of the output."""
        inputs, wide = as_rows(x), gradient.detach().float().reshape(-1, gradient.shape[-1])
        if len(inputs) != len(wide):
            raise ShapeError(f"{len(inputs)} rows of inputs go with {len(wide)} rows of gradients")
        chosen = torch.randperm(len(inputs), generator=generator)[:rows].sort().values.to(inputs.device)
        return cls(inputs[chosen].clone(), wide[chosen].square(), MinMax.of(inputs))

    def merge(self, other: "OutputRows") -> "OutputRows":
        """The rows of both."""
        if self.inputs.shape[1] != other.inputs.shape[1] or (self.weighing is None) != (other.weighing is None):
            raise ShapeError("merging rows of different layers")
        both = None
        if self.weighing is not None and other.weighing is not None:
            both = torch.cat([self.weighing, other.weighing])
        return OutputRows(torch.cat([self.inputs, other.inputs]), both, self.extremes.merge(other.extremes))

    def to(self, device: torch.device) -> "OutputRows":
        """On another device."""
        weighing = None if self.weighing is None else self.weighing.to(device)
        extremes = MinMax(self.extremes.low.to(device), self.extremes.high.to(device))
        return OutputRows(self.inputs.to(device), weighing, extremes)
