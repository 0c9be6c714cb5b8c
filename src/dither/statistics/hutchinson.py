"""Traces of matrices that can only be multiplied by, with a standard error, and a rule to stop by it.

Source: Hutchinson 1990: E[zᵀHz] = tr H for entries z of ±1. With directions over all layers at once the part of one
layer has the mean of its own trace too, as cross terms average out, with a larger variance.
Departs from PyHessian and NNCF: they stop when the running mean moves little, which happens by luck; here the standard
error of each layer's mean must be small.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import InputError

LEAST = 8  # draws before a standard error is believed


@dataclass(frozen=True)
class Trace:
    """Draws of zᵀHz."""

    draws: tuple[float, ...]

    def merge(self, other: "Trace") -> "Trace":
        """The draws of both."""
        return Trace(self.draws + other.draws)

    @property
    def mean(self) -> float:
        """The estimate."""
        return math.fsum(self.draws) / len(self.draws)

    @property
    def error(self) -> float:
        """Its standard error; infinite for a single draw."""
        n = len(self.draws)
        if n < 2:
            return math.inf
        return math.sqrt(math.fsum((draw - self.mean) ** 2 for draw in self.draws) / (n - 1) / n)


def rademacher(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Entries of +1 and -1 with equal chances, drawn on the CPU so that every device has the same."""
    return torch.randint(0, 2, tuple(shape), generator=generator).float() * 2 - 1


def settled(traces: Mapping[str, Trace], relative: float, share: float) -> bool:
    """Whether the standard error is below `relative` of the mean for that share of the traces."""
    if any(len(trace.draws) < LEAST for trace in traces.values()):
        return False
    sure = sum(trace.error <= relative * abs(trace.mean) for trace in traces.values())
    return sure >= share * len(traces)


def positive(values: Sequence[float], floor: float = 0.01) -> list[float]:
    """Values with those below `floor` of the median of the positive ones raised to it.

    A Hessian that is not positive semidefinite has negative traces, which would reward errors.

    Raises:
        InputError: no value is positive.
    """
    above = sorted(value for value in values if value > 0)
    if not above:
        raise InputError("no Hessian trace is positive: this is no minimum of the loss; use sensitivity fisher or kl")
    least = floor * above[len(above) // 2]
    return [max(value, least) for value in values]
