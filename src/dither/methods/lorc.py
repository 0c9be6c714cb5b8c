"""LoRC: a correction of rank 8 from the plain decomposition of what rounding lost, with factors in 8 bits.

Source: Yao et al., ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank
Compensation, arXiv 2303.08302: E = W - Ŵ, its leading singular vectors and values, rank 8 for every size of model,
after any base quantization. The correction needs no data; the GPTQ base does.
[choice] 8-bit factors are symmetric with one scale for each direction; the base is GPTQ as dither's own method has it
(act-order, static groups), rows have one asymmetric grid ("coarse"; `weights="int4:g128"` is the paper's fine kind).
Departs from the paper: both factors have equal norms in each direction, which is its product of roots of the singular
values.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar

from pydantic import Field

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_grid
from dither.formats.low_rank import FactorType
from dither.formats.spec import QuantSpec
from dither.methods.base import Method, WeightSpec
from dither.solvers.low_rank import corrected
from dither.solvers.rounding import Rounding, round_weight
from dither.walk import Block, Inputs


class LoRC(Method):
    """Low-rank compensation after rounding."""

    name: ClassVar[str] = "lorc"
    shards: ClassVar[bool] = True
    adds: ClassVar[tuple[str, ...]] = ("a low-rank term",)
    weights: WeightSpec = Field(default="int4:minmax", description="what layers are stored as")  # type: ignore[assignment]
    inputs: Inputs = Field(default="quantized", description="what the GPTQ base is measured on")
    rank: Annotated[int, Field(ge=1)] = 8
    factors: FactorType = Field(default="int8", description="what the correction is stored as")
    rounding: Rounding = Field(default="columns", description="what is corrected: GPTQ's codes or the nearest")
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure, round and correct block by block."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def alone(self, spec: QuantSpec) -> Callable[[LayerTask], LayerSolution] | None:
        """The solver, as it asks for nothing but the Gram."""
        return self.model_copy(update={"weights": spec, "overrides": {}}).solve

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer: round, then decompose what was lost."""
        grid, columns = fit_grid(task.weight, self.weight_spec(task.name)), task.columns
        gram = None if task.gram is None else task.gram.quantized[:columns, :columns]
        stored, notes = round_weight(task.weight, gram, grid, self.rounding, self.damping, self.act_order)
        result = corrected(stored, task.weight, self.rank, None, self.factors)
        return LayerSolution(result, task.bias, notes)
