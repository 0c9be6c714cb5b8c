"""What KL divergence each option will cost, to second order: as `kl` measures it, but for all at once.

A change ΔY of a layer's output changes the predictions by KL ≈ ½ ΔYᵀ Jᵀ (diag p - p pᵀ) J ΔY, with J the Jacobian of
the logits and p their softmax. For noise ε of ±1 the vector v = √p ε - p (√p·ε) has just that covariance, so that one
backward pass of v·logits gives g = Jᵀv and the mean of ½ (g·ΔY)² over draws is the divergence. Unlike a diagonal
Fisher it keeps how the errors of outputs and tokens add up or cancel.

Source: ours, from standard parts: Gauss-Newton of the divergence, and Hutchinson's estimator with a factor of the
softmax's Fisher matrix.
Departs from: nothing published as an allocator that we know of. Layers of a unit count as if they did not interact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import InputError
from dither.models.gradients import NOT_RESIDENT, rows_of
from dither.models.losses import class_rows
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.outputs import Codes, Rows, mean_over_batches, stored_codes, weighed_errors
from dither.sensitivities.swap import Quantizers, fit_inputs
from dither.statistics.hutchinson import rademacher

_STRIDE = 1_000_003  # between the seeds of draws


@dataclass(frozen=True)
class Quadratic:
    """`draws` backward passes over the data."""

    name: ClassVar[str] = "quadratic"
    about: ClassVar[str] = "KL of the outputs to second order, for all units at once; a backward pass a draw"

    draws: int = 4

    def measure(self, probe: Probe) -> Measured:
        """The sum over each unit's layers, as a mean over samples and draws."""
        if probe.network.weights is not None:
            raise InputError(f"quadratic: {NOT_RESIDENT}")
        stored, quantizers = stored_codes(probe), fit_inputs(probe)
        places = [(number, index) for number in range(self.draws) for index in range(len(probe.batches))]
        tasks = {f"draw {number} batch {index}": (number, index) for number, index in places}
        found = probe.each("quadratic", partial(_draw, probe, stored, quantizers), tasks)
        counts = [rows_of(probe.batches[index]) for _, index in places]
        return mean_over_batches(probe, list(zip(counts, found, strict=True)))


def _draw(probe: Probe, stored: Codes, quantizers: Quantizers, place: tuple[int, int]) -> Rows:
    number, index = place
    batch, seed = probe.batches[index], (probe.seed * _STRIDE + number) * len(probe.batches) + index
    loss, reduce = partial(_noise, seed=seed, samples=rows_of(batch)), _by_sample(rows_of(batch))
    return weighed_errors(probe, batch, loss, reduce, stored, quantizers)


def _noise(output: Any, seed: int, samples: int) -> Tensor:
    """v·logits with rows of v drawn by `seed`, scaled so that a sample counts the mean of its rows."""
    logits = class_rows(output)
    v = fisher_noise(logits.detach(), torch.Generator().manual_seed(seed))
    total: Tensor = (v * logits).sum() / max(len(logits) / samples, 1) ** 0.5
    return total


def fisher_noise(logits: Float[Tensor, "n c"], generator: torch.Generator) -> Float[Tensor, "n c"]:
    """Rows with mean 0 and covariance diag p - p pᵀ, the Fisher matrix of each row's softmax p."""
    p = logits.softmax(dim=1)
    noise = p.sqrt() * rademacher(p.shape, generator).to(p)
    return noise - p * noise.sum(dim=1, keepdim=True)


def _by_sample(samples: int) -> Callable[[Tensor, Tensor], Tensor]:
    """½ Σ (g·ΔY)² over samples; where a router mixes their rows, over all at once, as noise of samples averages out."""

    def reduce(gradient: Tensor, error: Tensor) -> Tensor:
        product = (gradient * error).double()
        groups = samples if len(product) % samples == 0 else 1
        return product.reshape(groups, -1).sum(dim=1).square().sum() / 2

    return reduce
