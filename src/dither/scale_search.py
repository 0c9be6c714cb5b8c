"""Searches of a block's ranges by the outputs of its layers: which rows a layer is judged by, and what is stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, measure, solve_and_store
from dither.engine.local import Engine, InProcess
from dither.formats.activation import Scales
from dither.formats.fit import fit_grid
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import QuantSpec
from dither.models.layers import has_gram, is_linear
from dither.nn.activation import ActivationQuantizer
from dither.statistics.output_rows import OutputRows
from dither.statistics.sample import RowSample
from dither.walk import Block, Inputs


@dataclass(frozen=True)
class SearchTask:
    """A layer whose ranges are to be searched; without `rows` there is nothing to judge them by, and `reason` why."""

    name: str
    weight: Float[Tensor, "o i"]
    spec: QuantSpec
    inputs: QuantSpec | None
    rows: OutputRows | None
    linear: bool
    reason: str = ""

    def nearest(self) -> "Searched":
        """The nearest codes on a grid of the weight's own; the input's range will be fitted to the input."""
        stored = quantize(self.weight, fit_grid(self.weight, self.spec))
        return Searched(self.name, stored, notes={"ranges": f"not searched: {self.reason}"})


@dataclass(frozen=True)
class Searched:
    """The stored weight of a layer and the quantizer of its input; None leaves its range to be fitted."""

    name: str
    weight: QTensor
    quantizer: ActivationQuantizer | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def calibrated(spec: QuantSpec | None, scales: Scales | None) -> ActivationQuantizer | None:
    """The quantizer of searched scales; None where none were searched."""
    return None if spec is None or scales is None else ActivationQuantizer(spec).set(scales)


def search_block(
    block: Block,
    weights: Mapping[str, QuantSpec],
    specs: Mapping[str, QuantSpec | None],
    rows: int,
    inputs: Inputs,
    engine: Engine,
    search: Callable[[SearchTask], Searched],
) -> None:
    """Search every layer of a block on its own, in formats of weights and inputs, and store what was found."""
    found = {one.name: one for one in engine.map(search, search_tasks(block, weights, specs, rows, inputs))}
    store_searched(block, specs, found, inputs)


def search_tasks(
    block: Block, weights: Mapping[str, QuantSpec], specs: Mapping[str, QuantSpec | None], rows: int, inputs: Inputs
) -> list[SearchTask]:
    """The block's layers with rows of their inputs: those found before the walk, else at least `rows` seen in it."""
    known = {name: one.rows for name, one in block.sensitivities.items() if one.rows is not None}
    if not known:
        known = _observed(block, [name for name in specs if has_gram(block.layer(name))], rows, inputs)
    tasks = []
    for name, spec in specs.items():
        layer, found = block.layer(name), known.get(name)
        reason = "no sample reaches it" if has_gram(layer) else "grouped convolution"
        weight = block.weight(name)
        found = None if found is None else found.to(weight.device)
        tasks.append(SearchTask(name, weight, weights[name], spec, found, is_linear(layer), reason))
    return tasks


def _observed(block: Block, names: list[str], rows: int, inputs: Inputs) -> dict[str, OutputRows]:
    whose: Inputs = "quantized" if inputs == "both" else inputs
    samples = block.observe({name: partial(_sample, rows=rows) for name in names}, whose) if names else {}
    return {name: OutputRows(one.rows, None, one.extremes) for name, one in samples.items()}


def _sample(seen: Tensor, original: Tensor, rows: int) -> RowSample:
    return RowSample.of(seen, rows * seen.shape[-1])


def store_searched(
    block: Block, specs: Mapping[str, QuantSpec | None], found: Mapping[str, Searched], inputs: Inputs
) -> None:
    """Measure what the searched ranges do to each layer, and put the layers into the network."""

    def solution(task: LayerTask) -> LayerSolution:
        return LayerSolution(found[task.name].weight, task.bias, found[task.name].notes)

    fitted = {name: one.quantizer for name, one in found.items() if one.quantizer is not None}
    tasks, quantizers = measure(block, specs, inputs, fitted)
    solve_and_store(block, tasks, quantizers, solution, InProcess())
