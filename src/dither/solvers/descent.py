"""Descent rules that move a parameter against its gradient in place: by its sign, with momentum, or Adam's.

Every rule moves an entry by about `rate` a step, whatever the size of the gradient, so that one schedule serves all.
Sources: signed descent as in SignRound (Cheng et al., arXiv 2309.05516); Adam (Kingma and Ba, ICLR 2015).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Rule = Literal["sign", "momentum", "adam"]
_FIRST, _SECOND, _SMALLEST = 0.9, 0.99, 1e-30  # Adam's moments; the second forgets faster, as there are few steps


class Descent:
    """One parameter's rule and what it remembers of earlier gradients."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self._steps = rule, 0
        self._mean: Tensor | None = None
        self._square: Tensor | None = None

    def step_(self, parameter: Float[Tensor, "*n"], gradient: Float[Tensor, "*n"], rate: float) -> None:
        """Move `parameter`; the gradient is used up."""
        if self.rule == "sign":
            parameter.add_(gradient.sign_(), alpha=-rate)
            return
        self._steps += 1
        self._mean = torch.zeros_like(gradient) if self._mean is None else self._mean
        self._mean.lerp_(gradient, 1 - _FIRST)
        if self.rule == "momentum":
            parameter.add_(self._mean.sign(), alpha=-rate)
            return
        self._square = torch.zeros_like(gradient) if self._square is None else self._square
        self._square.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        size = torch.div(self._square, 1 - _SECOND**self._steps, out=gradient).sqrt_().add_(_SMALLEST)
        parameter.addcdiv_(self._mean, size, value=-rate / (1 - _FIRST**self._steps))
