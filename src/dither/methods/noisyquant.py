"""NoisyQuant: a fixed noisy bias before an input is rounded, taken back by the layer's bias, lowers the output's error.

Source: Liu et al., NoisyQuant: Noisy Bias-Enhanced Post-Training Activation Quantization for Vision Transformers, CVPR
2023, arXiv 2211.16056, and its released code. One vector N ~ U(-n, n) a linear layer, the same for every token:
y = Q(x + N) Wᵀ + (b - W N). `base="linear"` is NoisyQuant-Linear: symmetric ranges of the extremes for weights, the
share of the extremes with the least output error for inputs (EasyQuant); `base="ptq4vit"` puts the noise on PTQ4ViT's
searched ranges and twins. n is found by a linear search of the output's error, or by the theorem (`noise="condition"`).
Departs from the released code: it draws 2 randn - 1 where the paper says uniform (`draw="gaussian-legacy"`); its common
shift before the search is off by default, as the paper has none (`mean`); layers are judged by `rows` rows; noise that
does not lower the error on these is left out; within a block a layer is searched on inputs that no quantizer of the
same block has changed. The classifier has noise as well. N is kept in float16 and counts in the size.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from dither.calibrate import quantize_operands
from dither.draws import generator_of
from dither.engine.local import Engine
from dither.formats.fit import fit_uniform
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind, QuantSpec, spec_field
from dither.methods.base import Method
from dither.models.gradients import Gradients
from dither.models.losses import drawn_prediction_loss
from dither.models.output_gradients import output_rows
from dither.nn.activation import ActivationQuantizer
from dither.scale_search import Searched, SearchTask, calibrated, search_block
from dither.solvers.noise_search import noise_by_condition, search_noise
from dither.solvers.output_search import Candidates, Found, Target, search_in_turns, search_input
from dither.statistics.sensitivity import Sensitivity
from dither.transforms.noisy_bias import Distribution, noise_direction
from dither.walk import Block, Inputs

_INPUTS = "int8:tensor:sym:mse"
WeightSpec = Annotated[QuantSpec, spec_field("int8:channel:sym:minmax")]
InputSpec = Annotated[QuantSpec | None, spec_field(_INPUTS)]


class NoisyQuant(Method):
    """Noise on the inputs of linear layers; `widest` is the largest reach tried, in steps of the grid."""

    name: ClassVar[str] = "noisyquant"
    shards: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint")
    adds: ClassVar[tuple[str, ...]] = ("noise that is added to inputs",)
    inputs_as: ClassVar[str] = _INPUTS

    weights: WeightSpec = Field(default="int8", description="what layers are stored as")  # type: ignore[assignment]
    activations: InputSpec = Field(default="int8", description="inputs of layers; none keeps them")  # type: ignore[assignment]
    attention: InputSpec = Field(default=None, description="query, key and value")
    overrides: dict[str, WeightSpec] = Field(default={}, description="other weight formats by name or pattern")
    inputs: Inputs = Field(default="quantized", description="earlier layers are quantized already (released code)")
    base: Literal["linear", "ptq4vit"] = Field(default="linear", description="the ranges that noise is added to")
    noise: Literal["search", "condition", "none"] = Field(
        default="search", description="reach of least output error, of the theorem's least mean, or no noise"
    )
    draw: Distribution = "uniform"
    mean: bool = Field(default=False, description="search a common shift first (released code)")
    widest: Annotated[float, Field(gt=0)] = 2.0  # released code: about two scales
    reaches: Annotated[int, Field(ge=1)] = Field(default=100, description="steps of the linear search")
    candidates: Annotated[int, Field(ge=1)] = Field(default=100, description="of a range")
    rows: Annotated[int, Field(ge=1)] = Field(default=512, description="rows of inputs that a layer is judged by")

    @classmethod
    def _probabilities(cls, bits: int, data: Mapping[str, Any]) -> str:
        twin = data.get("base") == "ptq4vit" and bits > 1
        return f"twin{bits}" if twin else f"int{bits}:tensor:unsigned:mse"

    @property
    def takes_gradients(self) -> bool:
        """PTQ4ViT's ranges do."""
        return self.base == "ptq4vit"

    def sensitivities(self, layers: Sequence[str], gradients: Gradients) -> Mapping[str, Sensitivity]:
        """For PTQ4ViT's ranges rows of every layer's input with squared gradients of its output."""
        if self.base != "ptq4vit":
            return {}
        found = output_rows(gradients, layers, self.rows, drawn_prediction_loss(generator_of("labels")))
        return {name: Sensitivity(rows=rows) for name, rows in found.items()}

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Search the ranges and the noise of each layer on its own, then store it."""
        for block in blocks:
            quantize_operands(block, self.operand_specs(), self.inputs)
            weights = {name: self.weight_spec(name) for name in block.unit.layers}
            search_block(block, weights, self.input_specs(block), self.rows, self.inputs, engine, self.search)

    def search(self, task: SearchTask) -> Searched:
        """Ranges, then noise of one layer."""
        if task.rows is None:
            return task.nearest()
        found, target = self.ranges(task), Target.of(task.rows, task.weight)
        stored, quantizer = quantize(task.weight, found.grid), calibrated(found.spec, found.scales)
        notes: dict[str, Any] = {}
        if quantizer is not None and task.linear and self.noise != "none":
            notes = self.add_noise(task, quantizer, found, target)
        return Searched(task.name, stored, quantizer, notes)

    def ranges(self, task: SearchTask) -> Found:
        """Those of the base."""
        if task.rows is None:
            raise TypeError(f"{task.name} has no rows")
        if self.base == "ptq4vit":
            return search_in_turns(task.rows, task.weight, task.spec, task.inputs, Candidates(count=self.candidates))
        grid = fit_uniform(task.weight, task.spec)
        if task.inputs is None or task.inputs.dynamic:
            return Found(grid, task.inputs, None, 0.0)
        how = Candidates(lowest=0.001, highest=1.0, count=self.candidates, twin=False)  # released code: i / 1000
        target = Target.of(task.rows, task.weight)
        return Found(grid, *search_input(task.rows, task.inputs, grid.round(task.weight), target, how))

    def add_noise(
        self, task: SearchTask, quantizer: ActivationQuantizer, found: Found, target: Target
    ) -> dict[str, Any]:
        """Give the quantizer its noise; returns what the report says of it."""
        if task.rows is None or found.spec is None or found.scales is None:
            raise TypeError(f"{task.name} has no ranges")
        width = task.weight.shape[1]
        direction = noise_direction(width, self.draw, generator_of(f"noise {task.name}")).to(task.weight)
        reaches = torch.linspace(self.widest / self.reaches, self.widest, self.reaches)
        if self.noise == "condition":
            offset, reach = noise_by_condition(task.rows, found.spec, found.scales, direction, reaches)
            quantizer.add(offset)
            return {"noise_reach": reach}
        stored = found.grid.round(task.weight)
        noise = search_noise(task.rows, found.spec, found.scales, stored, target, direction, reaches, self.mean)
        quantizer.add(noise.offset)
        return {"noise_reach": noise.reach, "error_before": noise.before, "error_after": noise.after}
