"""QERA: give each rounded weight the low-rank correction that is best for its layer's output.

Source: Zhang et al., QERA: an Analytical Framework for Quantization Error Reconstruction, ICLR 2025, arXiv 2410.06040.
`scale` chooses what the correction knows of the inputs: `exact` their second moments E[xᵀx], `approx` the diagonal of
these, `lqer` the mean magnitudes of L²QER (Zhang et al., arXiv 2402.02446), `identity` nothing (ZeroQuant-V2). From the
paper and its code: 4-bit integers with shared exponents in blocks of 32, rank 32, full-precision inputs for all layers.
Departs from the released code: no matrix root is computed (see `solvers/low_rank.py`); factors are stored in float16;
L²QER's magnitudes are a plain mean over all tokens, neither a running maximum over batches nor normalized.
[choice] A base that compensates column by column (`rounding="columns"`) and 8-bit factors are offered; a layer smaller
than the rank gets what it can hold; a grouped convolution has no common inputs and gets the identity, which notes say.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_grid
from dither.formats.low_rank import FactorType
from dither.methods.base import Method, WeightSpec
from dither.solvers.low_rank import corrected
from dither.solvers.rounding import Rounding, round_weight
from dither.statistics.magnitude import Magnitude
from dither.walk import Block


class QERA(Method):
    """Round, then reconstruct what the rounding lost by a product of two thin matrices."""

    name: ClassVar[str] = "qera"
    shards: ClassVar[bool] = True
    adds: ClassVar[tuple[str, ...]] = ("a low-rank term",)
    weights: WeightSpec = Field(default="mxint4:g32", description="what layers are stored as")  # type: ignore[assignment]
    scale: Literal["exact", "approx", "lqer", "identity"] = Field(
        default="exact", description="what the correction knows of the inputs"
    )
    rank: Annotated[int, Field(ge=1)] = 32  # released code, 4 bits; 64 at 3 bits
    factors: FactorType = Field(default="float16", description="what the correction is stored as")
    rounding: Rounding = Field(default="nearest", description="what is corrected: nearest codes or GPTQ's")
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure second moments (for `lqer` magnitudes too), then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            magnitudes = self.magnitudes(block) if self.scale == "lqer" else {}
            solve_and_store(block, tasks, quantizers, partial(self.solve, magnitudes=magnitudes), engine)

    def magnitudes(self, block: Block) -> dict[str, Float[Tensor, " i"]]:
        """The mean magnitude of each layer's input channels."""
        inputs = "quantized" if self.inputs == "both" else self.inputs
        found = block.observe(dict.fromkeys(block.unit.layers, _magnitude), inputs)
        return {name: statistic.mean for name, statistic in found.items()}

    def solve(self, task: LayerTask, magnitudes: Mapping[str, Float[Tensor, " i"]]) -> LayerSolution:
        """One layer: round, then correct."""
        grid, columns = fit_grid(task.weight, self.weight_spec(task.name)), task.columns
        gram = None if task.gram is None else task.gram.quantized[:columns, :columns]
        stored, notes = round_weight(task.weight, gram, grid, self.rounding, self.damping, self.act_order)
        moment = self.second_moment(gram, magnitudes.get(task.name))
        result = corrected(stored, task.weight, self.rank, moment, self.factors)
        notes |= _notes(result.low_rank.rank if result.low_rank else 0, self.rank)
        notes |= {"scale": "identity: grouped convolution"} if gram is None and self.scale != "identity" else {}
        return LayerSolution(result, task.bias, notes)

    def second_moment(
        self, gram: Float[Tensor, "i i"] | None, magnitude: Float[Tensor, " i"] | None
    ) -> Float[Tensor, "..."] | None:
        """What `scale` says is known of the inputs, up to a factor."""
        if gram is None or self.scale == "identity":
            return None
        if self.scale == "lqer":
            return None if magnitude is None else magnitude.square()
        return gram if self.scale == "exact" else gram.diagonal()


def _magnitude(seen: Float[Tensor, "*b i"], original: Float[Tensor, "*b i"]) -> Magnitude:
    return Magnitude.of(seen)


def _notes(rank: int, asked: int) -> dict[str, Any]:
    return {"rank": float(rank)} | ({"rank_limit": "smaller side of the matrix"} if rank < asked else {})
