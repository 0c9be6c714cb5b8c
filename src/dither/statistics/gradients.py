"""Second moments of a weight's gradient over samples: what each entry, or each pair of columns, costs in loss.

Around a trained model the Hessian of the loss is close to the mean of gᵀg over samples (Fisher's identity). Its
diagonal weighs SqueezeLLM's k-means (Kim et al., arXiv 2306.07629, section 4.1); its sum over the rows of a weight is
OAC's Hessian (Edalati et al., arXiv 2405.15025). Gradients are per sample: a mean gradient would be near zero.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import ShapeError


@dataclass(frozen=True)
class Fisher:
    """Sum of squared gradients of each entry over `samples` samples."""

    squares: Float[Tensor, "o i"]
    samples: int

    @classmethod
    def of(cls, gradient: Float[Tensor, "o i"]) -> "Fisher":
        """The statistic of one sample's gradient."""
        return cls(gradient.float().square(), 1)

    def merge(self, other: "Fisher") -> "Fisher":
        """Sums over both."""
        _check(self.squares, other.squares)
        return Fisher(self.squares + other.squares, self.samples + other.samples)


@dataclass(frozen=True)
class GradientGram:
    """Sum of GᵀG [i, i] of the samples' gradients G [o, i]: all rows of the weight share it."""

    gram: Float[Tensor, "i i"]
    samples: int

    @classmethod
    def of(cls, gradient: Float[Tensor, "o i"]) -> "GradientGram":
        """The statistic of one sample's gradient."""
        wide = gradient.float()
        return cls(wide.T @ wide, 1)

    def merge(self, other: "GradientGram") -> "GradientGram":
        """Sums over both."""
        _check(self.gram, other.gram)
        return GradientGram(self.gram + other.gram, self.samples + other.samples)

    def hessian(self) -> Float[Tensor, "i i"]:
        """In units of its mean diagonal; the identity where no gradient ever arrived.

        Solvers do not ask for its size, which may be 1e-10 and less.
        """
        unit = float(self.gram.diagonal().double().mean())
        return self.gram / unit if unit > 0 else torch.eye(len(self.gram), device=self.gram.device)


def _check(one: Tensor, two: Tensor) -> None:
    if one.shape != two.shape:
        raise ShapeError(f"merging statistics of gradients of {tuple(one.shape)} and {tuple(two.shape)}")
