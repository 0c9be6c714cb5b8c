"""Block reconstruction: learn what a block is made of by how far its output is from the original's.

Any callable block will do: `loss` gets the learned tensors by name and the samples to look at, and returns a scalar
with a graph behind the tensors. Gradients are of the tensors; each `Learned` turns its own into steps.

Source: SignRound (Cheng et al., arXiv 2309.05516), algorithm 1, with the released code's linear decay.
Departs from the released code: samples are drawn in turns, none a second time before all had theirs; the best state is
chosen by the loss on samples that stay the same, where the code compares losses of different draws.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from dither.errors import NonFiniteError
from dither.solvers.learned import Learned

Loss = Callable[[Mapping[str, Tensor], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Schedule:
    """`iterations` steps on `batch_size` samples each; the rate falls linearly from `rate` to 0.

    The loss of `checked` fixed samples is taken at the start and at each of the last `checks` fifths of the way.
    """

    iterations: int = 200
    rate: float = 1 / 200  # released code: 1 / iterations
    batch_size: int = 8
    checked: int = 16
    checks: int = 2


@dataclass(frozen=True)
class Reconstruction:
    """Loss on the fixed samples before and after, and the iteration whose state was kept."""

    before: float
    after: float
    iteration: int


def reconstruct_(
    learned: Mapping[str, Learned], loss: Loss, samples: int, schedule: Schedule, generator: torch.Generator
) -> Reconstruction:
    """Learn in place, and leave everything in the best state that was seen; the start is one of them.

    Raises:
        NonFiniteError: the loss is NaN or Inf.
    """
    fixed = torch.randperm(samples, generator=generator)[: schedule.checked].sort().values.tolist()
    before = best = _measured(learned, loss, fixed, schedule.batch_size)
    kept, kept_at = {name: one.state for name, one in learned.items()}, 0
    draws = _draws(samples, schedule.batch_size, generator)
    checks = {schedule.iterations * (5 - k) // 5 for k in range(schedule.checks)}
    for iteration in range(1, schedule.iterations + 1):
        _step(learned, loss, next(draws), schedule.rate * (schedule.iterations + 1 - iteration) / schedule.iterations)
        if iteration in checks:
            found = _measured(learned, loss, fixed, schedule.batch_size)
            if found < best:
                best, kept, kept_at = found, {name: one.state for name, one in learned.items()}, iteration
    for name, one in learned.items():
        one.restore_(kept[name])
    return Reconstruction(before, best, kept_at)


def _step(learned: Mapping[str, Learned], loss: Loss, drawn: Sequence[int], rate: float) -> None:
    values = {name: one.value().requires_grad_() for name, one in learned.items()}
    with torch.enable_grad():
        found = loss(values, drawn)
        gradients = torch.autograd.grad(found, list(values.values()), allow_unused=True)
    for one, gradient in zip(learned.values(), gradients, strict=True):
        if gradient is not None:  # an expert may have seen no token
            one.step_(gradient, rate)


def _measured(learned: Mapping[str, Learned], loss: Loss, samples: Sequence[int], batch_size: int) -> float:
    with torch.no_grad():
        values = {name: one.value() for name, one in learned.items()}
        pieces = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        total = sum(float(loss(values, piece)) * len(piece) for piece in pieces) / len(samples)
    if not isfinite(total):
        raise NonFiniteError("the block's output is NaN or Inf; its inputs or weights are too large for its dtype")
    return total


def _draws(samples: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Without end, `size` samples at a time in rising order; every sample comes once in each turn."""
    left: list[int] = []
    while True:
        while len(left) < size:
            left += torch.randperm(samples, generator=generator).tolist()
        yield sorted(set(left[:size]))
        left = left[size:]
