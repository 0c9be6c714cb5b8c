"""RepQuant: learned per-channel clipping behind norms, reparameterized, then weights reconstructed block by block.

Source: Li et al., RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale
Reparameterization, arXiv 2402.05628, which adds learnable dual clipping and quantized weight reconstruction to
RepQ-ViT (ICCV 2023, arXiv 2212.08254). Its text could not be read beyond the abstract, and no code is known, so the
parametrization, the optimizer and the unit of reconstruction are ours: both ends of a channel are sigmoids times its
extremes' distance from its mean, learned by Adam for the outputs of the layers that read the norm; weights are learned
by rounding offsets and ranges against the block's original output, from GPTQ's codes on; `iterations=0` stops at these,
which is the cheaper choice for language models.
Departs from RepQ-ViT: as `repq` does; and zero-points of the channels are real, as the norm's bias absorbs them. Behind
a norm that takes no bias (RMSNorm) the shift is added to the inputs of its layers, whose biases take it back
(`bare_norms="offset"`), or only the ratio of symmetric ranges is folded (`ratio`).
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dither.calibrate import (
    LayerSolution,
    LayerTask,
    measure,
    quantize_operands,
    reparameterize,
    solve_and_store,
)
from dither.draws import generator_of
from dither.engine.local import Engine, InProcess
from dither.formats.activation import Scales, fit_activation
from dither.formats.fit import fit_uniform
from dither.formats.grid import Grid, highest_code, implied_zero_point
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind, QuantSpec
from dither.methods.base import ActivationSpec, Method
from dither.models.links import Link
from dither.nn.activation import ActivationQuantizer
from dither.reconstruction import BlockLoss
from dither.solvers.columns import compensated_by_columns
from dither.solvers.descent import Rule
from dither.solvers.dual_clip import learn_clips
from dither.solvers.learned import LearnedGrid, Learning
from dither.solvers.reconstruct import Schedule, reconstruct_
from dither.walk import Block, Inputs

_ROWS = 2048  # of a norm's output, from which clips are learned [choice]
_BATCH = 256  # rows a step [choice]


class RepQuant(Method):
    """Clips, reparameterization, reconstruction; rates are in units of a sigmoid's argument and of 1 / iterations."""

    name: ClassVar[str] = "repquant"
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint")
    adds: ClassVar[tuple[str, ...]] = ("a shift of inputs behind norms without bias",)
    activations: ActivationSpec = Field(default="int4", description="inputs of layers; none keeps them")  # type: ignore[assignment]
    inputs: Inputs = Field(default="both", description="both: quantized inputs, original outputs")
    clip_steps: Annotated[int, Field(ge=0)] = Field(default=300, description="of the clips; 0 keeps searched ranges")
    clip_rate: Annotated[float, Field(gt=0)] = 0.05
    bare_norms: Literal["offset", "ratio"] = Field(
        default="offset", description="norms without bias: the shift is added to inputs, or only ratios are folded"
    )
    start: Literal["columns", "nearest"] = Field(
        default="columns", description="the codes that reconstruction begins with: GPTQ's, or the nearest"
    )
    iterations: Annotated[int, Field(ge=0)] = Field(default=200, description="of reconstruction; 0 keeps the start")
    rate: Annotated[float, Field(gt=0)] = Field(default=1.0, description="first step, in units of 1 / iterations")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=8, description="samples a step")
    rule: Rule = "adam"
    range_by: Literal["output", "weight"] = Field(default="output", description="whose error ranges of weights lower")
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    round_zero_point: bool = True

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Clip and reparameterize norms, measure, reconstruct, store."""
        seen: Inputs = "quantized" if self.inputs == "both" else self.inputs
        for block in blocks:
            quantize_operands(block, self.operand_specs(), self.inputs)
            fitted = {} if self.activations is None else self.reparameterize(block, self.activations, seen)
            tasks, quantizers = measure(block, self.input_specs(block), seen, fitted)
            if self.iterations:
                solutions = self.reconstruct(block, tasks, quantizers)
                solve_and_store(block, tasks, quantizers, lambda task: solutions[task.name], InProcess())  # noqa: B023
            else:
                solve_and_store(block, tasks, quantizers, self.solve, engine)

    def reparameterize(self, block: Block, spec: QuantSpec, inputs: Inputs) -> dict[str, ActivationQuantizer]:
        """Fold learned ranges of channels into norms and layers."""
        ranges = partial(self.clips, block)
        return reparameterize(block, spec, inputs, self.round_zero_point, ranges, self.bare_norms)

    def clips(self, block: Block, link: Link, rows: Float[Tensor, "n d"], spec: QuantSpec) -> Scales:
        """Learned scale and zero-point of each channel behind a norm."""
        scale, zero_point = fit_activation(rows, spec)
        if not self.clip_steps or spec.kind != "int":
            return scale, zero_point
        start = -zero_point * scale, (highest_code(spec) - zero_point) * scale
        weight = torch.cat([block.weight(name) for name in link.layers])
        spread, draws = rows[:: -(-len(rows) // _ROWS)], generator_of(link.norm)
        found = learn_clips(spread, weight, start, spec, self.clip_steps, self.clip_rate, _BATCH, draws)
        scale = (found.high - found.low) / highest_code(spec)
        symmetric = spec.symmetry != "asym"
        return scale, torch.full_like(scale, implied_zero_point(spec)) if symmetric else -found.low / scale

    def reconstruct(
        self, block: Block, tasks: list[LayerTask], quantizers: Mapping[str, ActivationQuantizer]
    ) -> dict[str, LayerSolution]:
        """Learn the weights of a block together, by its output."""
        starts = {task.name: self.begin(task) for task in tasks}
        weights = {name: LearnedGrid(weight, grid, Learning(self.rule)) for name, (weight, grid, _) in starts.items()}
        loss = BlockLoss(block, self.inputs, quantizers)
        schedule = Schedule(self.iterations, self.rate / max(self.iterations, 1), self.batch_size)
        found = reconstruct_(weights, loss, loss.samples, schedule, generator_of(block.unit.name))
        notes = {"loss_before": found.before, "loss_after": found.after, "iteration": found.iteration}
        return {
            task.name: LayerSolution(weights[task.name].stored(), task.bias, starts[task.name][2] | notes)
            for task in tasks
        }

    def begin(self, task: LayerTask) -> tuple[Float[Tensor, "o i"], Grid, dict[str, Any]]:
        """The weight whose nearest codes are the start, and its grid; without a Gram these are its own."""
        spec = self.weight_spec(task.name)
        if task.gram is None:
            return task.weight, fit_uniform(task.weight, spec), {"start": "nearest: grouped convolution"}
        gram = task.gram.quantized[: task.columns, : task.columns].double()
        grid = fit_uniform(task.weight, spec, gram.diagonal() if self.range_by == "output" else None)
        if self.start == "nearest":
            return task.weight, grid, {}
        return compensated_by_columns(task.weight.double(), gram, grid, self.damping).float(), grid, {}

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer on its own: its start."""
        weight, grid, notes = self.begin(task)
        return LayerSolution(quantize(weight, grid), task.bias, notes)
