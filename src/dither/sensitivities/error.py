"""The relative output error of each layer on its own, from a Gram of its inputs: no gradients, any size of model.

s = Σ ‖X (W - W_q)ᵀ‖² / ‖X Wᵀ‖² over a unit's layers. Says nothing of what the rest of the network makes of the error.

Source: common practice, as in exllamav2's measurement of relative errors; the formula of dither's own reports.
Departs from: nothing that has a paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dither.allocation.table import Option
from dither.calibrate import LayerTask
from dither.methods.base import Method
from dither.sensitivities.base import Measured, Probe, rounded
from dither.sensitivities.solved import of_tasks, solve_as
from dither.walk import Block


@dataclass(frozen=True)
class OutputError:
    """The error of what the method stores, from the task that it is solved from."""

    name: ClassVar[str] = "error"
    about: ClassVar[str] = "relative output error of each layer from Gram matrices; no gradients, streamed models too"

    @torch.no_grad()
    def measure(self, probe: Probe) -> Measured:
        """One walk over the full-precision model for each input format among the options."""
        rows = {name: [0.0] * len(probe.options) for name in probe.layers}
        possible = {name: probe.can(u) for u, unit in enumerate(probe.units) for name in unit.layers}
        done, total = 0, len(probe.anatomy.units)
        for block in probe.blocks():
            found = probe.kept(block.unit.name, partial(self._block, probe, block, possible))
            rows |= found
            done += 1
            probe.say("error", done, total)
        return Measured(probe.table(probe.by_unit(rows)))

    def _block(self, probe: Probe, block: Block, possible: Mapping[str, list[int]]) -> dict[str, list[float]]:
        able = {name: possible[name] for name in block.unit.layers}
        method = None if probe.solved is None else probe.solved.method
        found = of_tasks(block, probe.options, able, partial(self._row, method, probe.options), probe.engine)
        return {n: [row.get(place, 0.0) for place in range(len(probe.options))] for n, row in found.items()}

    def _row(self, method: Method | None, options: Sequence[Option], work: tuple[LayerTask, list[int]]) -> list[float]:
        task, places = work
        return [self._error(method, task, options[place]) for place in places]

    def _error(self, method: Method | None, task: LayerTask, option: Option) -> float:
        stored = _stored(method, task, option)
        if task.gram is None:  # a grouped convolution: outputs read different inputs
            power = task.weight.double().square().sum().clamp_min(1e-30)
            return float((stored.double() - task.weight).square().sum() / power)
        columns = stored if task.bias is None else torch.cat([stored, task.bias[:, None].to(stored)], dim=1)
        return task.gram.output_error(task.with_bias(), columns.to(task.gram.quantized))


def _stored(method: Method | None, task: LayerTask, option: Option) -> Float[Tensor, "o i"]:
    if option.weights is None:
        return task.weight
    codes = rounded(task.weight, option.weights) if method is None else solve_as(method, task, option)
    return codes.dequantize()
