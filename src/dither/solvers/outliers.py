"""Which weights of a matrix are outliers, to be stored apart from the codes.

Sources: SqueezeLLM (Kim et al., ICML 2024, arXiv 2306.07629), one ratio of the interquartile range for a whole model;
SpQR (Dettmers et al., ICLR 2024, arXiv 2306.03078), section 3 and algorithm 1: what a group gains without a weight.
Departs from SpQR's released code: only the two extremes of a group can change its range, so only these are left out one
by one; the gains are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dither.errors import InputError
from dither.formats.grid import decode, encode
from dither.formats.ranges import affine, quantiles
from dither.formats.spec import QuantSpec

POINTS = 1 << 16  # magnitudes kept of a matrix: a share is then exact to 1e-5 of the matrix
STEPS = 60  # halvings, beyond what float64 tells apart


def top_by_score(
    score: Float[Tensor, "o i"], fraction: float, scope: Literal["layer", "row"] = "layer"
) -> Bool[Tensor, "o i"]:
    """The entries of highest score: this fraction of the matrix, or of each row; of equal scores the first.

    The number is rounded to the nearest whole one.
    """
    rows = score.reshape(1, -1) if scope == "layer" else score
    count = round(fraction * rows.shape[1])
    order = torch.argsort(rows, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True).reshape(score.shape)


def filled_with_mean(
    weight: Float[Tensor, "o i"], mask: Bool[Tensor, "o i"], size: int | None = None
) -> Float[Tensor, "o i"]:
    """The weight with masked entries replaced by the mean of the others of their row (or group of `size` columns).

    Ranges that are fitted to it do not see the outliers (SpQR). A group of nothing but outliers becomes zero.
    """
    shape = (weight.shape[0], -1, size or weight.shape[1])
    cells, out = weight.reshape(shape), mask.reshape(shape)
    left = (~out).sum(dim=2, keepdim=True).clamp_min(1)
    mean = torch.where(out, 0, cells).sum(dim=2, keepdim=True) / left
    return torch.where(out, mean, cells).reshape(weight.shape)


@dataclass(frozen=True)
class Spread:
    """Quartiles of a matrix and its largest magnitudes: enough to count outliers by interquartile range.

    `tail` falls; each of its values stands for `step` entries.
    """

    first: float
    third: float
    tail: Float[Tensor, " t"]
    step: int
    count: int

    @classmethod
    def of(cls, weight: Float[Tensor, "o i"], points: int = POINTS) -> "Spread":
        """Of a weight; the upper half of its magnitudes in at most `points` steps."""
        flat = weight.reshape(1, -1).float()
        first, third = float(quantiles(flat, [0.25])[0]), float(quantiles(flat, [0.75])[0])
        tail = flat[0].abs().sort(descending=True).values[: (flat.numel() + 1) // 2]
        step = -(-tail.numel() // points)
        return cls(first, third, tail[step // 2 :: step].clone(), step, flat.numel())

    def threshold(self, ratio: float) -> float:
        """The magnitude from which a weight is an outlier, as `iqr_threshold`."""
        return iqr_threshold(self.first, self.third, ratio)

    def outliers(self, ratio: float) -> int:
        """How many entries reach the threshold."""
        return min(self.step * int((self.tail >= self.threshold(ratio)).sum()), self.count)


def iqr_threshold(first: float, third: float, ratio: float) -> float:
    """max(|q1 - r IQR|, |q3 + r IQR|) of the quartiles q1 and q3: the magnitude from which a weight is an outlier."""
    width = third - first
    return max(abs(first - ratio * width), abs(third + ratio * width))


def iqr_ratio(spreads: Sequence[Spread], fraction: float) -> float:
    """The one ratio of the interquartile range by which this fraction of all weights together are outliers.

    The smallest for which it is not more. Found by bisection, as the share falls while the ratio grows.

    Raises:
        InputError: there is no weight, or the fraction is not between 0 and 0.5.
    """
    total = sum(spread.count for spread in spreads)
    if not total or not 0 <= fraction < 0.5:
        raise InputError(f"outliers of {total} weights: expected a fraction from 0 to below 0.5, got {fraction}")
    low, high = 0.0, 1.0

    def few(ratio: float) -> bool:
        return sum(spread.outliers(ratio) for spread in spreads) <= fraction * total

    while not few(high) and high < 2.0**STEPS:
        high *= 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if few(middle) else (middle, high)
    return high


def leave_one_out_gains(
    group: Float[Tensor, "o g"], sensitivity: Float[Tensor, " g"], spec: QuantSpec
) -> Float[Tensor, "o g"]:
    """By how much a group's error falls when one weight leaves it: its own error, and what a narrower range saves.

    The range is that of the extremes, scales are not rounded to storage; the squared error of a column is multiplied by
    its `sensitivity` (1 / U_jj²).
    """
    base = _error(group, group.amin(dim=1), group.amax(dim=1), spec) * sensitivity
    total, gains = base.sum(dim=1), base.clone()
    for index, low, high in _without_extremes(group):
        left = _error(group, low, high, spec) * sensitivity
        gain = total - left.scatter(1, index[:, None], 0).sum(dim=1)
        gains.scatter_(1, index[:, None], gain[:, None])
    return gains


def _without_extremes(
    group: Float[Tensor, "o g"],
) -> list[tuple[Int[Tensor, " o"], Float[Tensor, " o"], Float[Tensor, " o"]]]:
    """The smallest and the largest weight of each row by index, each with the range of all the others."""
    if group.shape[1] == 1:
        return []
    found = []
    for index in (group.argmin(dim=1), group.argmax(dim=1)):
        place = index[:, None]
        low = group.scatter(1, place, torch.inf).amin(dim=1)
        found.append((index, low, group.scatter(1, place, -torch.inf).amax(dim=1)))
    return found


def _error(
    group: Float[Tensor, "o g"], low: Float[Tensor, " o"], high: Float[Tensor, " o"], spec: QuantSpec
) -> Float[Tensor, "o g"]:
    scale, zero_point = (part[:, None] for part in affine(low, high, spec, stored=False))
    return (decode(encode(group, scale, zero_point, spec), scale, zero_point) - group).square()
