"""Ranges of a layer's weight and input by the error of its output, searched in turns.

Source: PTQ4ViT (Yuan et al., ECCV 2022, arXiv 2111.12293): candidates are a share of the range that the extremes give,
weights and inputs are searched in alternation; the metric is the squared error of the output weighed by squared
gradients ("squared"), or its cosine similarity. EasyQuant (Wu et al., arXiv 2006.16669) is the same with fixed weights.
Departs from the released code: every row of scales has its own factor where a weight has several, the cosine is taken
along the rows of each output channel, so that both metrics are sums over output channels; a range may be asymmetric.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dither.formats.activation import Scales, fake_quantize, fit_activation
from dither.formats.fit import fit_uniform, grid_of_ranges
from dither.formats.grid import Grid, highest_code
from dither.formats.ranges import affine
from dither.formats.spec import QuantSpec
from dither.solvers.learned import symmetric_steps
from dither.statistics.output_rows import OutputRows

Metric = Literal["squared", "cosine"]
NEGATIVE_SIDE = 0.25  # of the positive one, from which on a twin has no small side [choice]; GELU's is far below


@dataclass(frozen=True)
class Candidates:
    """Shares of a range from `lowest` to `highest` in `count` steps, tried in `rounds` alternations.

    `twin` lets inputs with a small negative side have a step of their own for it, where that lowers the error.
    """

    lowest: float = 0.01  # released code
    highest: float = 1.2
    count: int = 100
    rounds: int = 3
    metric: Metric = "squared"
    twin: bool = True

    @property
    def shares(self) -> list[float]:
        """Largest first, so that of equal errors the wider range is taken."""
        step = (self.highest - self.lowest) / self.count
        return [self.highest - k * step for k in range(self.count + 1)]


@dataclass(frozen=True)
class Target:
    """What an output [n, o] should be, and how its values weigh."""

    output: Float[Tensor, "n o"]
    weighing: Float[Tensor, "n o"] | None
    metric: Metric

    @classmethod
    def of(cls, rows: OutputRows, weight: Float[Tensor, "o i"], metric: Metric = "squared") -> "Target":
        """The output of the layer itself, without its bias."""
        return cls(rows.inputs @ weight.T, rows.weighing, metric)

    def errors(self, output: Float[Tensor, "n o"]) -> Float[Tensor, " o"]:
        """The error of each output channel."""
        if self.metric == "cosine":
            return 1 - functional.cosine_similarity(output, self.output, dim=0)
        square = (output - self.output).square_()
        return (square if self.weighing is None else square.mul_(self.weighing)).sum(dim=0)


@dataclass(frozen=True)
class Found:
    """The grid of a weight, the format and scales of its input (None: not calibrated) and the error that they leave."""

    grid: Grid
    spec: QuantSpec | None
    scales: Scales | None
    error: float


def search_in_turns(
    rows: OutputRows, weight: Float[Tensor, "o i"], spec: QuantSpec, inputs: QuantSpec | None, how: Candidates
) -> Found:
    """Ranges of weight and input in `how.rounds` alternations, the weight first.

    Raises:
        SpecError: the weight's format is not uniform.
    """
    target = Target.of(rows, weight, how.metric)
    grid, scales = range_grid(weight, spec), None
    calibrated = inputs is not None and not inputs.dynamic
    seen = rows.inputs if inputs is None or calibrated else fake_quantize(rows.inputs, _UNUSED, inputs)
    error = float(target.errors(seen @ grid.round(weight).T).sum())
    for _ in range(how.rounds):
        grid = search_weight(weight, spec, seen, target, how)
        stored = grid.round(weight)
        if inputs is None or not calibrated:
            error = float(target.errors(seen @ stored.T).sum())
            break  # nothing else moves
        inputs, scales, error = search_input(rows, inputs, stored, target, how)
        seen = fake_quantize(rows.inputs, scales, inputs)
    return Found(grid, inputs, scales, error)


_UNUSED: Scales = (torch.ones(()), torch.zeros(()))


def range_grid(weight: Float[Tensor, "o i"], spec: QuantSpec) -> Grid:
    """The grid of the extremes."""
    return fit_uniform(weight, spec if spec.kind == "mxint" else spec.model_copy(update={"search": "minmax"}))


def search_weight(
    weight: Float[Tensor, "o i"], spec: QuantSpec, seen: Float[Tensor, "n i"], target: Target, how: Candidates
) -> Grid:
    """The grid whose rows of scales are each the share of their extremes that leaves the least error."""
    start = range_grid(weight, spec)
    low, high = _ends(start)
    best = low.new_full((low.shape[0], 1), torch.inf)
    factor = torch.ones_like(best)
    for share in how.shares:
        grid = grid_of_ranges(low * share, high * share, spec, start.row_of, start.column_of)
        error = _per_grid_row(target.errors(seen @ grid.round(weight).T), start)
        better = error < best
        best, factor = torch.where(better, error, best), torch.where(better, share, factor)
    return grid_of_ranges(low * factor, high * factor, spec, start.row_of, start.column_of)


def search_input(
    rows: OutputRows, spec: QuantSpec, stored: Float[Tensor, "o i"], target: Target, how: Candidates
) -> tuple[QuantSpec, Scales, float]:
    """Format and scales of the input that leave the least error behind a stored weight.

    With `how.twin`, inputs whose negative side is small are tried as a twin too: one fixed step for the negative side,
    down to the lowest value seen, and a searched one for the positive side.
    """
    low, high = rows.extremes.low.amin(), rows.extremes.high.amax()
    if spec.kind not in ("int", "twin") or (spec.kind == "twin" and low >= 0):  # other searches fit these
        scales = fit_activation(rows.inputs, spec)
        return spec, scales, float(target.errors(fake_quantize(rows.inputs, scales, spec) @ stored.T).sum())
    kinds: list[tuple[QuantSpec, Callable[[float], Scales]]] = [(spec, lambda share: _uniform(low, high, share, spec))]
    if spec.kind == "twin" or (how.twin and spec.bits > 1 and bool((low < 0) & (-low < NEGATIVE_SIDE * high))):
        twin = QuantSpec(kind="twin", bits=spec.bits, granularity="tensor")
        kinds = [*(kinds if spec.kind != "twin" else []), (twin, lambda share: _twin(low, high, share, twin))]
    best, found = torch.inf, (spec, kinds[0][1](1.0))
    for kind, scales_of in kinds:
        for share in how.shares:
            scales = scales_of(share)
            error = float(target.errors(fake_quantize(rows.inputs, scales, kind) @ stored.T).sum())
            if error < best:
                best, found = error, (kind, scales)
    return (*found, best)


def _uniform(low: Float[Tensor, ""], high: Float[Tensor, ""], share: float, spec: QuantSpec) -> Scales:
    scale, zero_point = affine((low * share)[None], (high * share)[None], spec, stored=False)
    return scale[0], zero_point[0]


def _twin(low: Float[Tensor, ""], high: Float[Tensor, ""], share: float, spec: QuantSpec) -> Scales:
    steps, smallest = spec.levels // 2 - 1, torch.finfo(low.dtype).tiny
    ends = (-low).clamp_min(smallest), (high * share).clamp_min(smallest)
    return torch.stack([ends[0] / steps, ends[1] / steps, torch.zeros_like(low)]), torch.zeros_like(low)


def _ends(grid: Grid) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
    """The range of each cell as `affine` will take it."""
    if grid.spec.symmetry == "asym":
        return -grid.zero_point * grid.scale, (highest_code(grid.spec) - grid.zero_point) * grid.scale
    largest = grid.scale * (2 ** (grid.spec.bits - 2) if grid.spec.kind == "mxint" else symmetric_steps(grid.spec))
    return -largest, largest


def _per_grid_row(errors: Float[Tensor, " o"], grid: Grid) -> Float[Tensor, "R 1"]:
    """Errors of output channels summed over those that share a row of scales."""
    rows = grid.scale.shape[0]
    if rows == 1:
        return errors.sum().reshape(1, 1)
    if grid.row_of is None:
        return errors[:, None]
    return errors.new_zeros(rows).index_add_(0, grid.row_of, errors)[:, None]
