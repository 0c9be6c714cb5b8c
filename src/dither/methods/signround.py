"""SignRound: learn the rounding and the range of every weight by what they do to a block's output.

Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, EMNLP Findings
2024, arXiv 2309.05516, algorithm 1, and its released code, AutoRound. From these: offsets within half a code and range
factors within [0, 1] from 0 and 1, steps by the sign of the gradient that fall linearly from 1 / iterations, 200
iterations, inputs of the quantized prefix against outputs of the original model, signed symmetric scales.
[choice] The preset `gptq-learned`, which nobody published, begins at GPTQ's compensated weights on groups fitted on the
way, and learns offsets and ranges (which may grow by a fifth) from there by Adam.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, measure, quantize_operands, solve_and_store
from dither.draws import generator_of
from dither.engine.local import Engine, InProcess
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_uniform
from dither.formats.grid import Grid
from dither.formats.mixed import MixedGrid
from dither.formats.spec import Kind, QuantSpec
from dither.methods.base import Method
from dither.nn.activation import ActivationQuantizer
from dither.reconstruction import BlockLoss, Weighing
from dither.solvers.affine import can_be_signed, fit_affine, fit_signed, has_own_cells
from dither.solvers.columns import compensated_by_columns, compensated_by_groups
from dither.solvers.descent import Rule
from dither.solvers.learned import Learned, LearnedGrid, LearnedTensor, Learning, RangeGradient
from dither.solvers.reconstruct import Schedule, reconstruct_
from dither.walk import Block, Inputs


class SignRound(Method):
    """Block reconstruction; rates are in codes (offsets) and shares of a range (range factors) per step."""

    name: ClassVar[str] = "signround"
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint")
    inputs: Inputs = Field(default="both", description="both: quantized inputs, original outputs, the paper's")
    iterations: Annotated[int, Field(ge=0)] = 200
    rate: Annotated[float, Field(gt=0)] = Field(default=1.0, description="first step, in units of 1 / iterations")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=8, description="samples a step")
    signed: bool = Field(default=True, description="symmetric codes reach furthest on the larger side (released code)")
    start: Literal["nearest", "columns", "groups"] = Field(
        default="nearest", description="columns: GPTQ's codes; groups: with grids fitted on the way, by input energy"
    )
    range_by: Literal["spec", "weight", "output"] = Field(
        default="spec", description="whose error first ranges lower; spec searches as the format says"
    )
    widest: Annotated[float, Field(ge=1)] = Field(default=1.0, description="how far ranges may grow")
    reach: Annotated[float, Field(gt=0)] = Field(default=0.5, description="of offsets, in codes")
    range_rate: Annotated[float, Field(ge=0)] = 1.0
    range_gradient: RangeGradient = Field(default="straight", description="codes: ranges move with codes as they are")
    rule: Rule = "sign"
    norm_rate: Annotated[float, Field(ge=0)] = Field(default=0.0, description="norms are learned too, by Adam")
    weigh: Weighing = Field(default="plain", description="token: relative to each token's mean square")
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure each block's inputs, learn its weights together, store them."""
        for block in blocks:
            quantize_operands(block, self.operand_specs(), self.inputs)
            seen: Inputs = "quantized" if self.inputs == "both" else self.inputs
            tasks, quantizers = measure(block, self.input_specs(block), seen, {})
            solutions = self.learn(block, tasks, quantizers)
            solve_and_store(block, tasks, quantizers, lambda task: solutions[task.name], InProcess())  # noqa: B023

    def learn(
        self, block: Block, tasks: list[LayerTask], quantizers: Mapping[str, ActivationQuantizer]
    ) -> dict[str, LayerSolution]:
        """What reconstruction makes of every layer."""
        learning = Learning(self.rule, 1.0, self.range_rate, self.reach, self.widest, self.range_gradient)
        weights = {task.name: self.begin(task, learning) for task in tasks}
        norms = {name: LearnedTensor(x, "adam", self.norm_rate) for name, x in self.norms(block).items()}
        generator = generator_of(block.unit.name)
        learned: dict[str, Learned] = {**weights, **norms}
        loss = BlockLoss(block, self.inputs, quantizers, self.weigh)
        schedule = Schedule(self.iterations, self.rate / max(self.iterations, 1), self.batch_size)
        found = reconstruct_(learned, loss, loss.samples, schedule, generator)
        notes = {"loss_before": found.before, "loss_after": found.after, "iteration": found.iteration}
        for name, norm in norms.items():
            block.module.get_parameter(block.local(name)).data.copy_(norm.value())
        return {t.name: LayerSolution(weights[t.name].stored(), t.bias, dict(notes)) for t in tasks}

    def norms(self, block: Block) -> dict[str, Tensor]:
        """The vectors of the block that are learned too, by full names: parameters of modules that hold no layer's."""
        if not self.norm_rate:
            return {}
        vectors = ((block.full(name), x) for name, x in block.module.named_parameters() if x.ndim == 1)
        return {name: x for name, x in vectors if name.rpartition(".")[0] not in block.unit.layers}

    def begin(self, task: LayerTask, learning: Learning) -> LearnedGrid:
        """A layer's weight before the first step."""
        spec, weight = self.weight_spec(task.name), task.weight
        if task.gram is None:
            return LearnedGrid(weight, self.grid(weight, spec, None), learning)
        gram = task.gram.quantized[: task.columns, : task.columns].double()
        energy = gram.diagonal()
        if self.start == "groups" and has_own_cells(spec):

            def fit(columns: Float[Tensor, "o g"], index: Int[Tensor, " g"]) -> Grid | Codebook:
                row = spec.model_copy(update={"granularity": "channel", "group_size": None})
                return self.grid(columns.float(), row, energy[index])

            weight, fitted = compensated_by_groups(weight.double(), gram, fit, spec, self.damping)
            return LearnedGrid(weight.float(), _uniform(fitted), learning)
        grid = self.grid(weight, spec, energy)
        if self.start != "nearest":
            weight = compensated_by_columns(weight.double(), gram, grid, self.damping).float()
        return LearnedGrid(weight, grid, learning)

    def grid(self, weight: Float[Tensor, "o i"], spec: QuantSpec, energy: Float[Tensor, " i"] | None) -> Grid:
        """The grid of the start: signed where that is possible, of least squared error where `range_by` asks for it."""
        searched, energy = self.range_by != "spec", energy if self.range_by == "output" else None
        if self.signed and can_be_signed(spec):
            return fit_signed(weight, spec, energy, searched)
        if searched and spec.symmetry == "asym" and has_own_cells(spec):
            return fit_affine(weight, spec, energy)
        return fit_uniform(weight, spec, energy)


def _uniform(grid: Grid | Codebook | MixedGrid) -> Grid:
    if not isinstance(grid, Grid):
        raise TypeError(f"{grid.spec} is no uniform grid")
    return grid
