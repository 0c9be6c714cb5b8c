"""ERQ: absorb the activation error by ridge regression, then round weights so that what is left absorbs their error.

Source: Zhong et al., ERQ: Error Reduction for Post-Training Quantization of Vision Transformers, ICML 2024, and its
extension arXiv 2407.06794 (the released code), which adds reparameterization and dual uniform quantization. The presets
`erq-v1` and `erq-v2` are the paper's two versions; whether the first reparameterized too is not known, here it does.
Departs from the released code: one streamed Gram a layer instead of stored activations; Cholesky solves; refinement
takes the best move of each row; the mean zero-point is rounded; ranges come from inputs that no quantizer of the same
block has changed yet.
Ours, and the default: `rounding="columns"` replaces the halves by GPTQ's column-by-column compensation over the Gram of
[x̂, 1], so that the bias compensates too, followed by refinement over the whole matrix; `inputs="quantized"` measures
behind the blocks that are quantized already; `range_by="output"` weighs the range search by the energy of each input.
Chosen on training pictures, not on those of the tables.
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_uniform
from dither.formats.grid import Grid
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind, QuantSpec
from dither.methods.base import ActivationSpec, Method
from dither.solvers.columns import round_by_columns
from dither.solvers.grouped import absorb_by_group, round_by_columns_in_groups
from dither.solvers.halves import refine_all, round_by_halves
from dither.solvers.ridge import absorb_activation_error
from dither.statistics.gram import Gram
from dither.walk import Block, Inputs


class ERQ(Method):
    """Activation error into weights, weight error into later weights and the bias.

    `lam_mean` is the ridge on the mean Gram, in input units squared.
    """

    name: ClassVar[str] = "erq"
    shards: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint")
    activations: ActivationSpec = Field(default="int4", description="inputs of layers; none keeps them")  # type: ignore[assignment]
    inputs: Inputs = Field(default="quantized", description="fp is the paper's: layers are then independent")
    reparameterize: bool = Field(default=True, description="RepQ-ViT's reparameterization first (v2)")
    dual: bool = Field(default=True, description="two grids a row behind reparameterized norms (v2)")
    absorb: bool = Field(default=True, description="Aqer: absorb the activation error before rounding")
    rounding: Literal["columns", "halves", "nearest"] = Field(default="columns", description="halves is the paper's")
    range_by: Literal["output", "weight"] = Field(
        default="output", description="whose error ranges lower; weight: paper"
    )
    refine_steps: Annotated[int, Field(ge=0)] = 100  # released code
    lam_mean: Annotated[float, Field(gt=0)] = 0.16  # released example: 1000 on the sum over 6304 rows
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    round_zero_point: bool = True

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Within a block layers are independent, and over the whole model too with `inputs="fp"`."""
        for block in blocks:
            tasks, quantizers = self.measure(block, self.reparameterize, self.round_zero_point)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer: Aqer, then the grid, then Wqer."""
        spec = self.weight_spec(task.name)
        if self.dual and task.reparameterized and spec.granularity == "channel":
            spec = spec.model_copy(update={"dual": True})
        if task.gram is None:
            return self.solve_grouped(task, spec)
        gram, columns = task.gram, task.columns
        lam = self.lam_mean * gram.rows
        weight = absorb_activation_error(task.with_bias(), gram, lam) if self.absorb else task.with_bias()  # Aqer
        energy = gram.quantized.diagonal()[:columns] if self.range_by == "output" else None
        grid = fit_uniform(weight[:, :columns].float(), spec, energy)  # after Aqer, then frozen
        weight, notes = self.round(weight, gram, grid, columns, lam)  # Wqer
        bias = None if task.bias is None else weight[:, columns].float()
        return LayerSolution(quantize(weight[:, :columns].float(), grid), bias, notes)

    def solve_grouped(self, task: LayerTask, spec: QuantSpec) -> LayerSolution:
        """A grouped convolution: Aqer and rounding by columns for each group; so few columns are not halved."""
        columns, gram = task.columns, task.grouped
        if gram is None:
            stored = quantize(task.weight, fit_uniform(task.weight, spec))
            return LayerSolution(stored, task.bias, {"rounding": "nearest: grouped convolution"})
        lam = self.lam_mean * gram.rows
        weight = absorb_by_group(task.with_bias(), gram, lam) if self.absorb else task.with_bias().to(gram.quantized)
        grid = fit_uniform(weight[:, :columns].float(), spec)
        if self.rounding == "nearest":
            notes: dict[str, Any] = {}
        else:
            weight, notes = round_by_columns_in_groups(weight, gram, grid, columns, self.damping)
        bias = None if task.bias is None else weight[:, columns].float()
        return LayerSolution(
            quantize(weight[:, :columns].float(), grid), bias, {"groups": len(gram.quantized), **notes}
        )

    def round(
        self, weight: Float[Tensor, "o k"], gram: Gram, grid: Grid, columns: int, lam: float
    ) -> tuple[Float[Tensor, "o k"], dict[str, Any]]:
        """Put the weight columns on the grid in the way `rounding` says."""
        if self.rounding == "halves":
            return round_by_halves(weight, gram.quantized, grid, columns, lam, self.refine_steps), {}
        if self.rounding == "columns":
            rounded = round_by_columns(weight, gram.quantized, grid, columns, self.damping, act_order=True)
            result, notes = rounded.weight, dict(rounded.notes)
        else:
            result, notes = torch.cat([grid.round(weight[:, :columns]), weight[:, columns:]], dim=1), {}
        if self.refine_steps:
            result = refine_all(result, weight, gram.quantized, grid, columns, lam, self.refine_steps)
        return result, notes
