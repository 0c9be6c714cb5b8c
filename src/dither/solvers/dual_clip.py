"""Ranges of each channel of an activation, learned by what its rounding does to the layers that read it.

Source: RepQuant (Li et al., arXiv 2402.05628), learnable per-channel dual clipping. The paper's parametrization could
not be read: here the two ends of a channel are sigmoids times the distances of its extremes from its mean, learned by
Adam with straight-through rounding. The zero-point is real, as a norm's bias can move a channel anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.formats.spec import QuantSpec
from dither.solvers.descent import Descent

START = 4.0  # of the sigmoids' arguments: 0.98 of the extremes
_CHECKS = 10  # how often the loss over all rows is taken
_SMALLEST = 1e-8  # of a range, in units of the activation's root mean square


@dataclass(frozen=True)
class Clips:
    """Lower and upper end of each channel [d], and the loss of the ranges given at the start and of these."""

    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]
    before: float
    after: float


def learn_clips(
    rows: Float[Tensor, "n d"],
    weight: Float[Tensor, "o d"],
    start: tuple[Float[Tensor, " d"], Float[Tensor, " d"]],
    spec: QuantSpec,
    steps: int,
    rate: float,
    batch: int,
    generator: torch.Generator,
) -> Clips:
    """The ends of least ‖(Q(x) - x) Wᵀ‖² over the rows, `weight` being that of all readers stacked.

    The ranges of `start` are kept where nothing better is found. A symmetric format keeps the lower end at minus the
    upper one.
    """
    symmetric, gram = spec.symmetry != "asym", weight.T @ weight
    centre = torch.zeros_like(rows[0]) if symmetric else rows.mean(dim=0)
    reach = torch.stack([centre - rows.amin(dim=0), rows.amax(dim=0) - centre])
    reach = reach.amax(dim=0, keepdim=True).expand(2, -1) if symmetric else reach
    reach = reach.clamp_min(_SMALLEST * float(rows.square().mean().sqrt().clamp_min(_SMALLEST)))
    logits, descent = torch.full_like(reach, START), Descent("adam")
    best = before = _loss(rows, torch.stack(start), gram, spec)
    kept, order = torch.stack(start), _turns(len(rows), batch, generator)
    for step in range(1, steps + 1):
        chosen = rows[next(order).to(rows.device)]
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            value = _output_error(chosen, _ends(leaf, centre, reach, symmetric), gram, spec)
            (slope,) = torch.autograd.grad(value, leaf)
        descent.step_(logits, slope, rate * (steps + 1 - step) / steps)
        if step % max(steps // _CHECKS, 1) == 0:
            ends = _ends(logits, centre, reach, symmetric)
            if (now := _loss(rows, ends, gram, spec)) < best:
                best, kept = now, ends
    return Clips(kept[0], kept[1], before, best)


def _ends(
    logits: Float[Tensor, "2 d"], centre: Float[Tensor, " d"], reach: Float[Tensor, "2 d"], symmetric: bool
) -> Float[Tensor, "2 d"]:
    shares = torch.sigmoid(logits)
    if symmetric:
        high = shares[1] * reach[1]
        return torch.stack([-high, high])
    return torch.stack([centre - shares[0] * reach[0], centre + shares[1] * reach[1]])


def _output_error(
    rows: Float[Tensor, "n d"], ends: Float[Tensor, "2 d"], gram: Float[Tensor, "d d"], spec: QuantSpec
) -> Float[Tensor, ""]:
    error = clipped(rows, ends[0], ends[1], spec) - rows
    return ((error @ gram) * error).sum() / rows.shape[0]


def _loss(rows: Float[Tensor, "n d"], ends: Float[Tensor, "2 d"], gram: Float[Tensor, "d d"], spec: QuantSpec) -> float:
    with torch.no_grad():
        return float(_output_error(rows, ends, gram, spec))


def clipped(
    rows: Float[Tensor, "n d"], low: Float[Tensor, " d"], high: Float[Tensor, " d"], spec: QuantSpec
) -> Float[Tensor, "n d"]:
    """Each channel on its own grid between its ends; gradients pass the rounding as if it were not there."""
    scale = (high - low) / (spec.levels - 1)
    if spec.symmetry != "asym":
        middle = spec.levels // 2
        return scale * (_straight(rows / scale) + middle).clamp(0, spec.levels - 1).sub(middle)
    return scale * _straight((rows - low) / scale).clamp(0, spec.levels - 1) + low


def _straight(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x + (x.round() - x).detach()


def _turns(rows: int, batch: int, generator: torch.Generator) -> Iterator[Int[Tensor, " b"]]:
    """Without end, rows in random order, `batch` at a time."""
    while True:
        yield from torch.randperm(rows, generator=generator).split(batch)
