"""AdaDim: let each layer's groups run along its inputs or along its outputs, whichever harms its output less.

Source: Heo et al., Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models, ICLR 2024, arXiv 2309.15531. Each candidate is rounded to nearest and judged alone; then the layer is rounded
in the axis that won, to nearest (RTN-ada) or column by column (GPTQ-ada, the default), there with act-order, static
groups along the inputs, and groups along the outputs fitted to each column when its turn comes. `judge="module"` is the
paper's: layers that share an input are judged at the output of the module that holds them (attention, MLP), others at
their own; `layer` judges all by their own output, which needs no further passes.
Departs from the released code: candidates are judged with the other layers of the block in full precision, not with
those before already rounded; both axes use one range convention throughout. A group that divides one axis only leaves
no choice, which the notes say; formats without groups neither.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_grid
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import QuantSpec, spec_field
from dither.methods.base import Method
from dither.models.layers import set_weight_matrix
from dither.solvers.columns import round_by_columns, round_by_groups
from dither.solvers.rounders import fit_group
from dither.statistics.total import Total
from dither.walk import Block, Inputs

BASE = QuantSpec.parse("int4:channel:asym:tight:clampzero")  # AWQ's range convention for whatever a text leaves out
AdaDimSpec = Annotated[QuantSpec, spec_field(BASE)]
Axis = Literal["inputs", "outputs"]
Errors = dict[str, dict[Axis, float]]  # layer → error of rounding it along each axis
NOT_JUDGED: Mapping[str, Mapping[Axis, float]] = MappingProxyType({})


class AdaDim(Method):
    """Groups along inputs or outputs, layer by layer; `damping` is in units of the mean diagonal of the Gram."""

    name: ClassVar[str] = "adadim"
    shards: ClassVar[bool] = True
    weights: AdaDimSpec = Field(
        default="int4:g128:asym:tight:clampzero",  # type: ignore[assignment]
        description="what layers are stored as; the axis of its groups is chosen",
    )
    overrides: dict[str, AdaDimSpec] = Field(default={}, description="other weight formats by name or pattern")
    rounding: Literal["columns", "nearest"] = Field(default="columns", description="GPTQ-ada or RTN-ada")
    judge: Literal["module", "layer"] = Field(default="module", description="at whose output an axis is judged")
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    act_order: bool = Field(default=True, description="columns of largest input energy first; groups stay static")

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure Grams, judge both axes of each layer, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            errors = self.judged(block, tasks) if self.judge == "module" else {}
            solve_and_store(block, tasks, quantizers, partial(self.solve, errors=errors), engine)

    def judged(self, block: Block, tasks: Sequence[LayerTask]) -> Errors:
        """The errors of those layers that are judged at the output of a module."""
        candidates = {task.name: nearest_codes(task.weight, self.weight_spec(task.name)) for task in tasks}
        errors: Errors = {}
        for names in block.groups():
            module = _common_module(block, names)
            chosen = {name: candidates[name] for name in names if len(candidates[name]) > 1}
            if module is not None and chosen:
                errors |= module_errors(block, module, chosen, "fp" if self.inputs == "fp" else "quantized")
        return errors

    def solve(self, task: LayerTask, errors: Mapping[str, Mapping[Axis, float]] = NOT_JUDGED) -> LayerSolution:
        """One layer; without errors from outside it is judged by its own output."""
        candidates = nearest_codes(task.weight, self.weight_spec(task.name))
        found = errors.get(task.name) or own_errors(task, candidates)
        axis = min(candidates, key=lambda axis: found[axis])
        stored, notes = candidates[axis], _notes(candidates, axis, found)
        if task.gram is None or self.rounding == "nearest":
            return LayerSolution(stored, task.bias, notes)
        gram, spec = task.gram.quantized[: task.columns, : task.columns], stored.spec
        weight, how = task.weight.to(gram), (task.columns, self.damping, self.act_order)
        if axis == "outputs" and spec.granularity == "group":
            rounded = round_by_groups(weight, gram, lambda column, _: fit_group(column, spec), spec, *how)
        else:
            rounded = round_by_columns(weight, gram, stored.grid, *how)
        return LayerSolution(quantize(rounded.weight.float(), rounded.grid), task.bias, notes | rounded.notes)


def nearest_codes(weight: Float[Tensor, "o i"], spec: QuantSpec) -> dict[Axis, QTensor]:
    """The weight rounded to nearest along each axis that the group size divides.

    Raises:
        ShapeError: it divides neither.
    """
    if spec.granularity != "group" or spec.group_size is None:
        return {spec.group_along: quantize(weight, fit_grid(weight, spec))}
    sides: dict[Axis, int] = {"inputs": weight.shape[1], "outputs": weight.shape[0]}
    fitting = [axis for axis, length in sides.items() if length % spec.group_size == 0] or [spec.group_along]
    specs = {axis: spec.model_copy(update={"group_along": axis}) for axis in fitting}
    return {axis: quantize(weight, fit_grid(weight, along)) for axis, along in specs.items()}


def own_errors(task: LayerTask, candidates: Mapping[Axis, QTensor]) -> dict[Axis, float]:
    """The error of the layer's own output; of the weight where the outputs read different inputs."""
    found: dict[Axis, float] = {}
    for axis, stored in candidates.items():
        change = stored.dequantize(torch.float64) - task.weight
        gram = None if task.gram is None else task.gram.quantized[: task.columns, : task.columns].double()
        found[axis] = float(change.square().sum() if gram is None else ((change @ gram) * change).sum())
    return found


def module_errors(
    block: Block, module: str, candidates: Mapping[str, Mapping[Axis, QTensor]], stream: Inputs
) -> Errors:
    """The squared error of a module's output with one layer rounded, for each layer and axis, over all batches.

    `module` and the layers are full names. Every call of the module is repeated with the rounded weights in place.
    """
    network = block.reference if stream == "fp" else block.module
    parts: list[tuple[str, Total]] = []

    def repeat(owner: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        true = _first(output).float()
        for name, axes in candidates.items():
            layer = network.get_submodule(block.local(name))
            before = layer.get_parameter("weight").detach().clone()
            for axis, stored in axes.items():
                set_weight_matrix(layer, stored.dequantize(), None)  # type: ignore[arg-type]
                changed = _first(owner.forward(*args, **kwargs)).float()
                error = float((changed - true).square().sum(dtype=torch.float64))
                parts.append((f"{axis} {name}", Total(error)))
            layer.get_parameter("weight").data.copy_(before)

    def taken() -> list[tuple[str, Total]]:
        batch, parts[:] = list(parts), []
        return batch

    handle = network.get_submodule(block.local(module)).register_forward_hook(repeat, with_kwargs=True)
    try:
        found = block.team.merge(taken() for _ in block.streams[stream].run(network))
    finally:
        handle.remove()
    never = Total(0.0)  # a module that no batch calls
    return {n: {axis: found.get(f"{axis} {n}", never).value for axis in axes} for n, axes in candidates.items()}


def _common_module(block: Block, names: Sequence[str]) -> str | None:
    """The module within the block that holds all layers of a group; None for a single layer, or the block itself."""
    homes = {name.rpartition(".")[0] for name in names}
    home = homes.pop() if len(names) > 1 and len(homes) == 1 else ""
    return home if home and home != block.unit.name else None


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else _first(output[0])


def _notes(candidates: Mapping[Axis, QTensor], axis: Axis, errors: Mapping[Axis, float]) -> dict[str, Any]:
    if len(candidates) == 1:
        return {"axis": f"{axis}: no choice"}
    other = next(one for one in candidates if one != axis)
    return {"axis": axis, "gain": errors[other] / errors[axis] if errors[axis] else 1.0}
