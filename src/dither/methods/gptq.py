"""GPTQ: round column by column, and let the columns that are left compensate each error.

Source: Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323, Algorithm 1; act-order and static groups of the released
code. Without static groups each group's grid is fitted when its turn comes; under act-order such groups hold columns of
like energy, and which column is in which group is stored.
[choice] `range_by="output"` fits each grid by least squares, its columns weighed by the energy of their inputs, instead
of to the extremes; with groups fitted on the way this is the preset `gptq-fitted`, which nobody published.
Departs from the released code: static groups are the default; a group fitted on the way sees every compensation made
before, also what the released code has not applied yet within a block; activations are quantized too (as ERQ's
comparison does), and the Gram is then that of the quantized inputs; dead columns are rounded to nearest; damping that
fails climbs a ladder that the report shows.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.methods.base import Method
from dither.solvers.affine import fit_least_squares
from dither.solvers.columns import round_by_columns, round_by_groups
from dither.solvers.grouped import round_by_columns_in_groups
from dither.solvers.rounders import group_spec
from dither.walk import Block, Inputs


class GPTQ(Method):
    """Column-by-column rounding; `damping` is in units of the mean diagonal of the Gram."""

    name: ClassVar[str] = "gptq"
    shards: ClassVar[bool] = True
    inputs: Inputs = Field(default="quantized", description="the paper measures behind the quantized prefix")
    act_order: bool = Field(default=True, description="columns of largest input energy first")
    static_groups: bool = Field(default=True, description="grids of the original weight; false: fitted on the way")
    range_by: Literal["spec", "output"] = Field(
        default="spec", description="ranges as the format searches them, or of least error weighed by input energy"
    )
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01  # released code: percdamp
    reparameterize: bool = Field(default=False, description="RepQ-ViT's reparameterization first")
    round_zero_point: bool = True

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure Grams of quantized inputs, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block, self.reparameterize, self.round_zero_point)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def alone(self, spec: QuantSpec) -> Callable[[LayerTask], LayerSolution] | None:
        """The solver, unless norms are folded into the weights first."""
        if self.reparameterize:
            return None
        return self.model_copy(update={"weights": spec, "overrides": {}}).solve

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer; the groups of a grouped convolution side by side, their columns as they are stored."""
        spec, columns = self.weight_spec(task.name), task.columns
        if task.gram is None:
            grid = fit_grid(task.weight, spec)
            if task.grouped is None:
                return LayerSolution(
                    quantize(task.weight, grid), task.bias, {"rounding": "nearest: grouped convolution"}
                )
            inputs = task.grouped.without_bias(columns)
            weight, found = round_by_columns_in_groups(task.weight, inputs, grid, columns, self.damping)
            return LayerSolution(quantize(weight.float(), grid), task.bias, dict(found))
        gram = task.gram.quantized[:columns, :columns]
        weight, how = task.weight.to(gram), (columns, self.damping, self.act_order)
        energy = gram.diagonal()
        if self.static_groups or spec.granularity != "group":
            rounded = round_by_columns(weight, gram, self.grid(task.weight, spec, energy), *how)
        else:
            alone = group_spec(spec)
            rounded = round_by_groups(
                weight, gram, lambda group, index: self.grid(group.float(), alone, energy[index]), spec, *how
            )
        return LayerSolution(quantize(rounded.weight.float(), rounded.grid), task.bias, dict(rounded.notes))

    def grid(self, weight: Float[Tensor, "o i"], spec: QuantSpec, energy: Float[Tensor, " i"]) -> Grid | Codebook:
        """The grid of a weight or of a group of its columns."""
        return fit_least_squares(weight, spec, energy) if self.range_by == "output" else fit_grid(weight, spec)
