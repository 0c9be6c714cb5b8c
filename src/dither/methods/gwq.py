"""GWQ: keep the hundredth of the weights whose gradients of one sequence are largest; small groups for the rest.

Source: Shao et al., GWQ: Gradient-Aware Weight Quantization for Large Language Models, arXiv 2411.00850. Its abstracts
say: outliers are found by the gradient of the language-modelling loss on one calibration sample, no Hessian is used,
the top 1 % of the weights stay in half precision, the rest is stored group-wise in low bits, below 4 bits on average.
Nothing else of the paper was at hand and no code is public, so the rest is [choice]: the score is |g| (or |g w|, the
first-order change of the loss; squares of both rank alike), the share is of each layer (or of each row, or of the whole
model), and the rest is in 3 bits by groups of 16, whose scales and zero-points are in 3 bits by 16 rows as in SpQR:
3.95 bits a weight. Ranges are fitted without the kept weights; the rest is rounded to nearest (or column by column as
in GPTQ, around what is kept). Models other than language models are asked for the cross-entropy to their own
prediction.
Departs from the paper: unknown beyond the above; no number of this method is the paper's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec, spec_field
from dither.methods.base import Method
from dither.models.gradients import Gradients
from dither.solvers.columns import round_by_columns
from dither.solvers.outliers import filled_with_mean, top_by_score
from dither.solvers.rounding import Rounding
from dither.solvers.spqr import with_outliers
from dither.statistics.sensitivity import Sensitivity
from dither.walk import Block, Inputs

BASE = QuantSpec.parse("int3:channel:asym:tight:realzero")  # SpQR's range convention for whatever a text leaves out
GWQSpec = Annotated[QuantSpec, spec_field(BASE)]
Scored = Callable[[str, Tensor], Tensor]  # (layer, gradient) → how much each weight matters


class GWQ(Method):
    """Rounding of all but the weights that the loss of one sequence minds most."""

    name: ClassVar[str] = "gwq"
    shards: ClassVar[bool] = True
    backward: ClassVar[bool] = True
    weights: GWQSpec = Field(
        default="int3:g16:asym:tight:realzero:s3.16",  # type: ignore[assignment]
        description="what layers are stored as; sB.G quantizes the scales",
    )
    overrides: dict[str, GWQSpec] = Field(default={}, description="other weight formats by name or pattern")
    inputs: Inputs = Field(default="quantized", description="whose inputs are calibrated on: fp, quantized or both")
    fraction: Annotated[float, Field(ge=0, lt=0.5)] = Field(default=0.01, description="share of weights kept")
    score: Literal["gradient", "taylor"] = Field(default="gradient", description="|g|, or |g w|")
    scope: Literal["layer", "global", "row"] = Field(default="layer", description="what the share is taken of")
    sample: Annotated[int, Field(ge=0)] = Field(default=0, description="the calibration sequence that is asked")
    rounding: Rounding = Field(default="nearest", description="of the others: to nearest, or GPTQ's")
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, le=10)] = 0.01

    def sensitivities(self, layers: Sequence[str], gradients: Gradients) -> Mapping[str, Sensitivity]:
        """Which weights are kept; a weight without any gradient never is."""

        def scored(name: str, gradient: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
            return gradient.abs() if self.score == "gradient" else (gradient * gradients.weight(name)).abs()

        if self.scope == "global":
            limit = self._global_limit(layers, gradients, scored)
            kept = gradients.of_sample(self.sample, layers, lambda name, g: scored(name, g) >= limit)
        else:
            kept = gradients.of_sample(self.sample, layers, lambda name, g: self._top(scored(name, g)))
        return {name: Sensitivity(kept=mask) for name, mask in kept.items()}

    def _top(self, score: Float[Tensor, "o i"]) -> Bool[Tensor, "o i"]:
        return top_by_score(score, self.fraction, "row" if self.scope == "row" else "layer") & (score > 0)

    def _global_limit(self, layers: Sequence[str], gradients: Gradients, scored: Scored) -> float:
        """The smallest score that is kept of all layers together, from a backward pass of its own."""
        total = sum(gradients.weight(name).numel() for name in layers)
        best: list[Tensor] = []

        def collect(name: str, gradient: Float[Tensor, "o i"]) -> None:
            together = torch.cat([*best, scored(name, gradient).flatten()])
            best[:] = [together.topk(min(round(self.fraction * total), len(together))).values]

        gradients.of_sample(self.sample, layers, collect)
        tiny = torch.finfo(torch.float32).smallest_normal
        return max(float(best[0].min()), tiny) if best and len(best[0]) else torch.inf

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure inputs, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer; without a Gram (grouped convolution) the nearest codes, which the notes say."""
        spec, kept = self.weight_spec(task.name), None if task.sensitivity is None else task.sensitivity.kept
        kept = torch.zeros_like(task.weight, dtype=torch.bool) if kept is None else kept
        by_group = spec.granularity == "group" and spec.group_along == "inputs"
        grid = fit_grid(filled_with_mean(task.weight, kept, spec.group_size if by_group else None), spec)
        notes: dict[str, Any] = {"outliers": float(kept.double().mean()), "sample": float(self.sample)}
        weight = task.weight
        if self.rounding == "columns" and task.gram is None:
            notes["rounding"] = "nearest: grouped convolution"
        elif self.rounding == "columns" and task.gram is not None:
            gram = task.gram.quantized[: task.columns, : task.columns]
            rounded = round_by_columns(weight.to(gram), gram, grid, task.columns, self.damping, self.act_order, kept)
            weight, notes = rounded.weight.float(), notes | rounded.notes
        stored = with_outliers(weight, grid, kept) if bool(kept.any()) else quantize(weight, grid)
        return LayerSolution(stored, task.bias, notes)
