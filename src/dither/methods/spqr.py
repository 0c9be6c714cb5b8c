"""SpQR: small groups whose scales are themselves quantized, and the few weights that cost most kept apart.

Source: Dettmers, Svirschevski, Egiazarian, Kuznedelev, Frantar, Ashkboos, Borzunov, Hoefler and Alistarh, SpQR: A
Sparse-Quantized Representation for Near-Lossless LLM Weight Compression, ICLR 2024, arXiv 2306.03078, algorithm 1. The
default is the released code's near-lossless setting (4 bits, groups of 16, statistics in 3 bits by 16 rows, threshold
0.2, damping 1, act-order). The preset `spqr-3bit` is the paper's point below 4 bits: 3 bits, groups of 8, statistics in
3 bits by 64 rows; the threshold that goes with it is our choice, which keeps about 0.2 % outliers
(measured on SmolLM2-135M).
Departs from the released code: layers of a block are measured together, not in four rounds; dead columns are rounded,
not dropped; the bits that the order of the columns and the rows of outliers take are counted; activations and attention
may be quantized as by every method.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar

from pydantic import Field

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec, spec_field
from dither.methods.base import Method
from dither.solvers.spqr import above_threshold, round_with_outliers
from dither.walk import Block, Inputs

BASE = QuantSpec.parse("int4:channel:asym:tight:realzero")  # SpQR's range convention for whatever a text leaves out
SpQRSpec = Annotated[QuantSpec, spec_field(BASE)]


class SpQR(Method):
    """Column-by-column rounding with outliers; `damping` is in units of the mean diagonal of the Gram."""

    name: ClassVar[str] = "spqr"
    shards: ClassVar[bool] = True
    adds: ClassVar[tuple[str, ...]] = ("sparse outliers",)
    weights: SpQRSpec = Field(
        default="int4:g16:asym:tight:realzero:s3.16",  # type: ignore[assignment]
        description="what layers are stored as; sB.G quantizes the scales",
    )
    overrides: dict[str, SpQRSpec] = Field(default={}, description="other weight formats by name or pattern")
    inputs: Inputs = Field(default="quantized", description="the paper measures behind the quantized prefix")
    act_order: bool = Field(default=True, description="columns of largest input energy first, and grouped so")
    damping: Annotated[float, Field(gt=0, le=10)] = 1.0  # released script: percdamp
    threshold: Annotated[float, Field(gt=0)] = Field(
        default=0.2, description="error of an outlier over the mean error of dropping a weight; higher keeps fewer"
    )
    leave_one_out: bool = Field(default=True, description="keep likely outliers out of their group's range")

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure Grams of quantized inputs, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def alone(self, spec: QuantSpec) -> Callable[[LayerTask], LayerSolution] | None:
        """The solver, as it asks for nothing but the Gram."""
        return self.model_copy(update={"weights": spec, "overrides": {}}).solve

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer; without a Gram (grouped convolution) the nearest codes, which the notes say."""
        spec = self.weight_spec(task.name)
        if task.gram is None:
            stored = quantize(task.weight, fit_grid(task.weight, spec))
            return LayerSolution(stored, task.bias, {"rounding": "nearest: grouped convolution"})
        hessian = task.gram.quantized[: task.columns, : task.columns]
        cutoff = above_threshold(self.threshold)
        stored, notes = round_with_outliers(
            task.weight.to(hessian), hessian, spec, self.damping, self.act_order, cutoff, self.leave_one_out
        )
        return LayerSolution(stored, task.bias, dict(notes))
