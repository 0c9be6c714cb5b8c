"""The relative output error of each layer on its own, from a Gram of its inputs: no gradients, any size of model.

s = Σ ‖X (W - W_q)ᵀ‖² / ‖X Wᵀ‖² over a unit's layers. Says nothing of what the rest of the network makes of the error.

Source: common practice, as in exllamav2's measurement of relative errors; the formula of dither's own reports.
Departs from: nothing that has a paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dither.allocation.table import Option
from dither.calibrate import LayerTask, measure
from dither.engine.purpose import precisely
from dither.sensitivities.base import Measured, Probe, rounded
from dither.solvers.rounding import round_weight
from dither.walk import Block, walk

_DAMPING = 0.01


@dataclass(frozen=True)
class OutputError:
    """`rounding="columns"` measures GPTQ's error instead of that of the nearest codes: what a GPTQ run will have."""

    name: ClassVar[str] = "error"
    about: ClassVar[str] = "relative output error of each layer from Gram matrices; no gradients, streamed models too"

    rounding: Literal["nearest", "columns"] = "nearest"

    @torch.no_grad()
    def measure(self, probe: Probe) -> Measured:
        """One walk over the full-precision model for each input format among the options."""
        rows = {name: [0.0] * len(probe.options) for name in probe.layers}
        possible = {name: probe.can(u) for u, unit in enumerate(probe.units) for name in unit.layers}
        done, total = 0, len(probe.anatomy.units)
        network = probe.network
        with network.by_hand([unit.name for unit in probe.anatomy.units]):
            blocks = walk(network.model, probe.anatomy, network.run, probe.batches, "fp", load=network.load)
            for block in blocks:
                found = probe.kept(block.unit.name, partial(self._block, probe, block, possible))
                rows |= found
                done += 1
                probe.say("error", done, total)
        return Measured(probe.table(probe.by_unit(rows)))

    def _block(self, probe: Probe, block: Block, possible: Mapping[str, list[int]]) -> dict[str, list[float]]:
        rows = {name: [0.0] * len(probe.options) for name in block.unit.layers}
        for spec in dict.fromkeys(option.activations for option in probe.options):
            tasks, _ = measure(block, dict.fromkeys(block.unit.layers, spec), "fp", {})
            places = {n: [p for p in possible[n] if probe.options[p].activations == spec] for n in rows}
            work = [(task, places[task.name]) for task in tasks]
            scored = probe.engine.map(partial(precisely, partial(self._row, probe.options)), work)
            for (task, _), scores in zip(work, scored, strict=True):
                for place, score in zip(places[task.name], scores, strict=True):
                    rows[task.name][place] = score
        return rows

    def _row(self, options: Sequence[Option], work: tuple[LayerTask, list[int]]) -> list[float]:
        task, places = work
        return [self._error(task, options[place]) for place in places]

    def _error(self, task: LayerTask, option: Option) -> float:
        stored = self._stored(task, option)
        if task.gram is None:  # a grouped convolution: outputs read different inputs
            power = task.weight.double().square().sum().clamp_min(1e-30)
            return float((stored.double() - task.weight).square().sum() / power)
        columns = stored if task.bias is None else torch.cat([stored, task.bias[:, None].to(stored)], dim=1)
        return task.gram.output_error(task.with_bias(), columns.to(task.gram.quantized))

    def _stored(self, task: LayerTask, option: Option) -> Float[Tensor, "o i"]:
        if option.weights is None:
            return task.weight
        grid = rounded(task.weight, option.weights).grid
        gram = None if task.gram is None else task.gram.quantized[: task.columns, : task.columns]
        codes, _ = round_weight(task.weight, gram, grid, self.rounding, _DAMPING)
        return codes.dequantize()
