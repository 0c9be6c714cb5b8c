"""How far the fixed noise before an input's rounding should reach: by the layer's output error, or by the theorem.

Source: NoisyQuant (Liu et al., CVPR 2023, arXiv 2211.16056), and its released code: a linear search of the reach by the
squared error of the output, on top of a common shift that is searched first where `mean` asks for it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.activation import Scales, covered_range, fake_quantize
from dither.formats.spec import QuantSpec
from dither.solvers.output_search import Target
from dither.statistics.output_rows import OutputRows
from dither.transforms.noisy_bias import best_reach

MEAN_STEPS = 200  # released code: shifts of a common value, in each direction up to one step


@dataclass(frozen=True)
class Noise:
    """The vector [i] that is added to inputs, its reach in steps of the grid, and the output's error with and without.

    `offset` is None where no reach is better than none.
    """

    offset: Float[Tensor, " i"] | None
    reach: float
    before: float
    after: float


def search_noise(
    rows: OutputRows,
    spec: QuantSpec,
    scales: Scales,
    stored: Float[Tensor, "o i"],
    target: Target,
    direction: Float[Tensor, " i"],
    reaches: Float[Tensor, " k"],
    mean: bool = False,
) -> Noise:
    """The reach among `reaches` (in steps) with the least output error, none if none lowers it."""
    step = coarse_step(scales, spec)

    def error(offset: Tensor) -> float:
        offset = offset.to(torch.float16).to(rows.inputs)  # as it will be stored
        seen = fake_quantize(rows.inputs, scales, spec, offset) - offset
        return float(target.errors(seen @ stored.T).sum())

    before = error(torch.zeros_like(direction))
    best, found, reach = before, None, 0.0
    centre = torch.zeros_like(direction)
    for k in range(-MEAN_STEPS, MEAN_STEPS) if mean else ():
        offset = torch.full_like(direction, step * k / MEAN_STEPS)
        if (now := error(offset)) < best:
            best, found, centre = now, offset, offset
    for one in reaches.tolist():
        offset = centre + direction * (one * step)
        if (now := error(offset)) < best:
            best, found, reach = now, offset, one
    return Noise(found, reach, before, best)


def noise_by_condition(
    rows: OutputRows, spec: QuantSpec, scales: Scales, direction: Float[Tensor, " i"], reaches: Float[Tensor, " k"]
) -> tuple[Float[Tensor, " i"] | None, float]:
    """The noise whose reach, in steps, has the lowest mean change of the input's error by the theorem, if below 0.

    Values that are clipped have no bin and are left out.
    """
    low, high = covered_range(scales, spec) or (0.0, 0.0)
    values = rows.inputs[(rows.inputs >= low) & (rows.inputs <= high)]
    distance = (fake_quantize(values[None], scales, spec)[0] - values).abs()
    step, half = coarse_step(scales, spec), _half_bins(values, scales, spec)
    reach, _ = best_reach(distance, half, reaches.to(values) * step)
    return (direction * reach, reach / step) if reach > 0 else (None, 0.0)


def coarse_step(scales: Scales, spec: QuantSpec) -> float:
    """The step of a uniform grid, of a twin's positive side."""
    return float(scales[0][1]) if spec.kind == "twin" else float(scales[0])


def _half_bins(values: Float[Tensor, " n"], scales: Scales, spec: QuantSpec) -> Float[Tensor, " n"]:
    if spec.kind != "twin":
        return torch.full_like(values, float(scales[0]) / 2)
    fine, coarse, split = scales[0].tolist()
    below = values < split if split > 0 else values < 0
    return torch.where(below, fine / 2, coarse / 2)
