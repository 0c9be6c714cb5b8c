"""GPTQ: round column by column, and let the columns that are left compensate each error.

Source: Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323, Algorithm 1; act-order and static groups of the released
code.
Departs from the released code: activations are quantized too (as ERQ's comparison does), and the Gram is then that of
the quantized inputs; dead columns are rounded to nearest; damping that fails climbs a ladder that the report shows.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_uniform
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind
from dither.methods.base import Method
from dither.solvers.columns import round_by_columns
from dither.walk import Block, Inputs


class GPTQ(Method):
    """Column-by-column rounding; `damping` is in units of the mean diagonal of the Gram."""

    name: ClassVar[str] = "gptq"
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint")
    inputs: Inputs = Field(default="quantized", description="the paper measures behind the quantized prefix")
    act_order: bool = Field(default=True, description="columns of largest input energy first; groups stay static")
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01  # released code: percdamp
    reparameterize: bool = Field(default=False, description="RepQ-ViT's reparameterization first")
    round_zero_point: bool = True

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure Grams of quantized inputs, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block, self.reparameterize, self.round_zero_point)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer; without a Gram (grouped convolution) the nearest codes, which the notes say."""
        grid = fit_uniform(task.weight, self.weight_spec(task.name))
        if task.gram is None:
            return LayerSolution(quantize(task.weight, grid), task.bias, {"rounding": "nearest: grouped convolution"})
        columns = task.columns
        gram = task.gram.quantized[:columns, :columns]
        rounded = round_by_columns(task.weight.to(gram), gram, grid, columns, self.damping, self.act_order)
        return LayerSolution(quantize(rounded.weight.float(), grid), task.bias, dict(rounded.notes))
