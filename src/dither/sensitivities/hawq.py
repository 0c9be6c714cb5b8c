"""HAWQ-V2: mean Hessian trace of each layer times the squared error of its weight.

Ω_i(b) = (Tr(H_i) / n_i) ‖Q_b(W_i) - W_i‖², and for inputs a_i of d_i numbers a sample
Ω_i(b) = (mean_k Tr(∂²f(x_k)/∂a_i²) / d_i) mean_k ‖Q_b(a_i) - a_i‖².

Source: Dong et al., HAWQ-V2, NeurIPS 2020, arXiv 1911.03852: sections 3.1 (weights) and 3.4 (activations), traces by
Hutchinson's method. No official code of this version exists.
Departs from it: every double backward pass serves all layers; standard errors decide when to stop; a negative trace
counts as 1 % of the median one; the loss is the model's own (next token, or its own prediction) where labels are not
given; inputs of layers are measured, as those are what dither quantizes, not outputs.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from dither.models.curvature import hessian_product, input_traces
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.swap import fit_inputs, input_errors
from dither.statistics.hutchinson import Trace, positive, rademacher, settled

_STRIDE = 1_000_003  # between the seeds of draws


@dataclass(frozen=True)
class HawqV2:
    """At most `probes` draws, until `share` of the layers have a standard error below `relative` of their trace."""

    name: ClassVar[str] = "hawq-v2"
    about: ClassVar[str] = "mean Hessian trace times squared weight error; two backward passes a draw, float32"

    probes: int = 100  # PyHessian's limit; the paper sees convergence at about 50
    relative: float = 0.05
    share: float = 0.95

    def measure(self, probe: Probe) -> Measured:
        """Ω of each unit as the sum over its layers; `priority` is its mean trace."""
        traces = self._traces(probe)
        means = dict(zip(traces, positive([trace.mean for trace in traces.values()]), strict=True))
        sizes = {name: probe.layer(name).weight.numel() for name in traces}
        moved = self._moved(probe)
        scores = {n: [means[n] / sizes[n] * error for error in row] for n, row in moved.items()}
        errors = {n: [traces[n].error / sizes[n] * error for error in row] for n, row in moved.items()}
        if any(option.activations is not None for option in probe.options):
            added = self._inputs(probe)
            scores = {n: [a + b for a, b in zip(row, added[n], strict=True)] for n, row in scores.items()}
        priority = [sum(means[n] for n in unit.layers) / sum(sizes[n] for n in unit.layers) for unit in probe.units]
        facts = {
            "draws": len(next(iter(traces.values())).draws),
            "relative_error": {n: trace.error / abs(trace.mean) if trace.mean else None for n, trace in traces.items()},
            "traces": {n: trace.mean for n, trace in traces.items()},
            "negative": [n for n, trace in traces.items() if trace.mean < 0],
        }
        squares = {n: [error**2 for error in row] for n, row in errors.items()}
        spread = np.sqrt(probe.table(probe.by_unit(squares)))
        return Measured(probe.table(probe.by_unit(scores)), spread, np.array(priority), facts=facts)

    def _traces(self, probe: Probe) -> dict[str, Trace]:
        """Draw after draw until the standard errors are small."""
        found: dict[str, Trace] = {}
        tasks = {f"draw {number}": number for number in range(self.probes)}
        for drawn in probe.each("hessian", partial(_draw, probe), tasks):
            parts = {name: Trace((value,)) for name, value in drawn.items()}
            found = {name: found[name].merge(part) if name in found else part for name, part in parts.items()}
            if settled(found, self.relative, self.share):
                break
        return found

    @torch.no_grad()
    def _moved(self, probe: Probe) -> dict[str, list[float]]:
        """‖Q(W) - W‖² of each layer and option."""
        probe.solve()
        rows = {}
        for number, unit in enumerate(probe.units):
            able = probe.can(number)
            for name in unit.layers:
                rows[name] = [
                    _distance(probe, name, place) if place in able else 0.0 for place in range(len(probe.options))
                ]
        return rows

    def _inputs(self, probe: Probe) -> dict[str, list[float]]:
        """Ω of the inputs of each layer, for the options that quantize them."""
        traces, sizes = dict[str, Trace](), dict[str, float]()
        tasks = {f"input draw {number}": number for number in range(self.probes)}
        for drawn in probe.each("hessian of inputs", partial(_input_draw, probe), tasks):
            sizes = {name: size for name, (_, size) in drawn.items()}
            parts = {name: Trace((value,)) for name, (value, _) in drawn.items()}
            traces = {n: traces[n].merge(part) if n in traces else part for n, part in parts.items()}
            if settled(traces, self.relative, self.share):
                break
        means = dict(zip(traces, positive([trace.mean for trace in traces.values()]), strict=True))
        errors = input_errors(probe, fit_inputs(probe))
        return {
            name: [
                0.0 if option.activations is None else means[name] / sizes[name] * errors[name, option.activations]
                for option in probe.options
            ]
            for name in probe.layers
        }


def _distance(probe: Probe, name: str, place: int) -> float:
    return float((probe.stored(name, place) - probe.weight(name)).double().square().sum())


def _draw(probe: Probe, number: int) -> dict[str, float]:
    """zᵀHz of each layer for directions over all of them."""
    generator = torch.Generator().manual_seed(probe.seed * _STRIDE + number)
    layers = {name: probe.layer(name).weight for name in probe.layers}
    directions = {name: rademacher(weight.shape, generator).to(weight) for name, weight in layers.items()}
    products = hessian_product(probe.gradients(), directions)
    return {name: float((directions[name] * product).double().sum()) for name, product in products.items()}


def _input_draw(probe: Probe, number: int) -> dict[str, tuple[float, float]]:
    return input_traces(probe.gradients(), probe.layers, probe.seed * _STRIDE + number)
