"""OAC: round by the Hessian of the output's cross-entropy instead of that of each layer's own output.

Source: Edalati, Ghaffari, Nejad, Hou, Chen, Asgharian and Partovi Nia, OAC: Output-adaptive Calibration for Accurate
Post-training Quantization, AAAI 2025, arXiv 2405.15025. From the abstract and summaries: the Hessian of the output
cross-entropy by Fisher's identity, layers and rows independent of each other, the Hessians of a layer's rows added up;
it takes the place of the inputs' Gram in a Hessian-based solver (SpQR for 2 bits, BiLLM for binary weights).
H = mean over sequences of GᵀG, with G [o, i] the gradient of one sequence's loss; no public code exists.
[choice] Two phases for each block: gradients of the whole network with the blocks before it quantized, then the solver;
`gradients="once"` takes all gradients of the full-precision network in one pass instead. The default is SpQR's loop at
2 bits by groups of 128 with statistics in 3 bits by 16 rows and 0.04 % outliers, which makes 2.09 bits of Llama's
matrices; the solver's own settings are those of its method (the
preset `oac-billm` is BiLLM's loop, where layers of another than its format are rounded column by column).
Damping is in units of the mean diagonal, as this Hessian's spectrum is more skewed than a Gram's. Models other than
language models are asked for the cross-entropy to their own prediction.
Departs from the paper: float32 instead of half-precision gradients, so no loss scale is needed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.errors import InputError, SpecError
from dither.formats.fit import fit_grid
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import Kind, QuantSpec, spec_field
from dither.methods.base import Method
from dither.models.gradients import Gradients
from dither.solvers.binary import BinarySettings, round_binary
from dither.solvers.columns import round_by_columns
from dither.solvers.spqr import above_threshold, largest_share, round_with_outliers
from dither.statistics.gradients import GradientGram
from dither.statistics.sensitivity import Sensitivity
from dither.walk import Block, Inputs

BASE = QuantSpec.parse("int2:channel:asym:tight:realzero")  # SpQR's range convention for whatever a text leaves out
OACSpec = Annotated[QuantSpec, spec_field(BASE)]


class OAC(Method):
    """A Hessian-based solver on the Hessian of the output's cross-entropy."""

    name: ClassVar[str] = "oac"
    shards: ClassVar[bool] = True
    backward: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint", "nf", "fp", "nuq")
    weights: OACSpec = Field(
        default="int2:g128:asym:tight:realzero:s3.16",  # type: ignore[assignment]
        description="what layers are stored as; sB.G quantizes the scales",
    )
    overrides: dict[str, OACSpec] = Field(default={}, description="other weight formats by name or pattern")
    inputs: Inputs = Field(default="quantized", description="whose inputs are calibrated on: fp, quantized or both")
    gradients: Literal["block", "once"] = Field(
        default="block", description="taken behind the quantized prefix of each block, or once before all"
    )
    samples: Annotated[int, Field(ge=1)] = Field(default=128, description="sequences whose gradients are taken")
    solver: Literal["spqr", "gptq", "billm"] = Field(default="spqr", description="what rounds by the Hessian")
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, le=10)] = 0.1
    outliers: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0004, description="share of weights SpQR keeps apart"
    )
    outliers_by: Literal["share", "threshold"] = Field(
        default="share", description="what finds them; a threshold that suits 4 bits keeps far too many at 2"
    )
    threshold: Annotated[float, Field(gt=0)] = Field(default=0.2, description="of SpQR's outliers, if it is asked for")
    leave_one_out: bool = Field(default=True, description="SpQR's likely outliers stay out of their group's range")

    @model_validator(mode="after")
    def _binary_is_billm(self) -> "OAC":
        """Binary weights are stored as tables of levels, and nothing else is."""
        tables = [spec for spec in (self.weights, *self.overrides.values()) if spec.kind == "nuq"]
        if tables and self.solver != "billm":
            raise SpecError(f"{tables[0]} needs solver=billm, which stores binary weights as nuq2:gN:dual")
        return self

    def sensitivities(self, layers: Sequence[str], gradients: Gradients) -> Mapping[str, Sensitivity]:
        """The Hessians of all layers, if they are to be found once."""
        if self.gradients == "block":
            return {}
        return _hessians(gradients.accumulate(dict.fromkeys(layers, GradientGram.of), self.samples))

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Take the block's gradients while its layers are as they were, then solve each layer on its own."""
        for block in blocks:
            found = block.sensitivities
            if self.gradients == "block":
                found = _hessians(block.gradients(dict.fromkeys(block.unit.layers, GradientGram.of), self.samples))
            tasks, quantizers = self.measure(block)
            tasks = [replace(task, sensitivity=found[task.name]) for task in tasks]
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer.

        Raises:
            InputError: its gradients have not been taken.
        """
        if task.sensitivity is None or task.sensitivity.hessian is None:
            raise InputError(f"{task.name}: OAC rounds by gradients, which have not been taken")
        hessian = task.sensitivity.hessian.double()
        stored, notes = self._round(task.weight.to(hessian), hessian, self.weight_spec(task.name))
        return LayerSolution(stored, task.bias, notes)

    def _round(
        self, weight: Float[Tensor, "o i"], hessian: Float[Tensor, "i i"], spec: QuantSpec
    ) -> tuple[QTensor, dict[str, Any]]:
        """The stored weight, and what the solver noted."""
        if spec.kind == "nuq":
            return round_binary(weight, hessian, spec, self.damping, self.act_order, BinarySettings())
        if self.solver == "spqr":
            by_share = self.outliers_by == "share"
            cutoff = largest_share(self.outliers) if by_share else above_threshold(self.threshold)
            stored, notes = round_with_outliers(
                weight, hessian, spec, self.damping, self.act_order, cutoff, self.leave_one_out
            )
            return stored, dict(notes)
        grid = fit_grid(weight.float(), spec)
        rounded = round_by_columns(weight, hessian, grid, weight.shape[1], self.damping, self.act_order)
        return quantize(rounded.weight.float(), grid), dict(rounded.notes)


def _hessians(found: Mapping[str, GradientGram]) -> dict[str, Sensitivity]:
    return {name: Sensitivity(hessian=part.hessian()) for name, part in found.items()}
