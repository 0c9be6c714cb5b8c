"""BiLLM: about one bit a weight, with columns that matter binarized twice and the others on either side of a split.

Source: Huang et al., BiLLM: Pushing the Limit of Post-Training Quantization for LLMs, ICML 2024, arXiv 2402.04291, and
its released code (braq): Hessian damping 0.01, blocks of 128 columns, up to 49 salient columns a block, no act-order.
`search="metric"` chooses columns and split by the error of binarizing the metric itself, as that code does; `weight`
by the error of the weight, as the paper says. `feedback="diagonal"` is the released compensation, between blocks only
and by each column's own diagonal; `block` solves for the whole block; `columns` also compensates within it. The preset
`billm-columns` is our best at the same bits: `weight`, `columns` and act-order (measured: relative output error of
four layers of SmolLM2-135M 0.088 as released, 0.057 with `weight`, 0.030 with `columns`, 0.020 with all three).
Departs from the released code: where 128 does not divide the columns, the divisor that is nearest on a log scale is
taken, which the notes say; everything stored is counted, so that a weight takes about three bits and not the paper's
1.09, which the notes give beside it as `paper_bits`. A layer that `overrides` gives a uniform format is swept by GPTQ.
"""

from collections.abc import Callable, Iterable
from math import log
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.errors import InputError
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind, QuantSpec
from dither.methods.base import Method, WeightSpec
from dither.solvers.binary import Assignment, BinarySettings, Feedback, Metric, Search, round_binary
from dither.solvers.columns import round_by_columns
from dither.walk import Block, Inputs


class BiLLM(Method):
    """Binary weights with residuals; `damping` is in units of the mean diagonal of the Gram."""

    name: ClassVar[str] = "billm"
    shards: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("nuq", "int", "mxint", "nf", "fp")
    weights: WeightSpec = Field(default="nuq2:g128:dual", description="what layers are stored as; gN is the block")  # type: ignore[assignment]
    inputs: Inputs = Field(default="quantized", description="the paper measures behind the quantized prefix")
    damping: Annotated[float, Field(gt=0, le=10)] = 0.01
    act_order: bool = Field(default=False, description="columns of largest input energy first, and in blocks so")
    salient_by: Metric = Field(default="hessian", description="what ranks columns: w² / U_jj², or |w|")
    search: Search = Field(default="metric", description="whose error decides: released code's; weight: the paper's")
    feedback: Feedback = Field(default="diagonal", description="what is compensated; block and columns are ours")
    assignment: Assignment = Field(default="class", description="a weight's level: of its class, or ours, the nearest")

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure Grams of quantized inputs, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def alone(self, spec: QuantSpec) -> Callable[[LayerTask], LayerSolution] | None:
        """The solver, as it asks for nothing but the Gram."""
        return self.model_copy(update={"weights": spec, "overrides": {}}).solve

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer.

        Raises:
            InputError: a layer without a common input (grouped convolution) has no Hessian to be binarized by.
        """
        spec, columns = self.weight_spec(task.name), task.columns
        if task.gram is None:
            return self.without_gram(task, spec)
        hessian = task.gram.quantized[:columns, :columns]
        weight = task.weight.to(hessian)
        if spec.kind != "nuq":
            grid = fit_grid(task.weight, spec)
            rounded = round_by_columns(weight, hessian, grid, columns, self.damping, self.act_order)
            return LayerSolution(quantize(rounded.weight.float(), grid), task.bias, dict(rounded.notes))
        spec, notes = _fitting(spec, columns)
        settings = BinarySettings(self.salient_by, self.search, self.feedback, self.assignment)
        stored, found = round_binary(weight, hessian, spec, self.damping, self.act_order, settings)
        return LayerSolution(stored, task.bias, notes | found)

    def without_gram(self, task: LayerTask, spec: QuantSpec) -> LayerSolution:
        """The nearest codes of a uniform format."""
        if spec.kind == "nuq":
            raise InputError(
                f"{task.name}: outputs of a grouped convolution read different inputs, which BiLLM cannot weigh; "
                "skip the layer or give it a uniform format in overrides"
            )
        stored = quantize(task.weight, fit_grid(task.weight, spec))
        return LayerSolution(stored, task.bias, {"rounding": "nearest: grouped convolution"})


def _fitting(spec: QuantSpec, columns: int) -> tuple[QuantSpec, dict[str, Any]]:
    """The format with a block that divides the columns, and a note where it is not the one asked for."""
    size = spec.group_size
    if size is None or columns % size == 0:
        return spec, {}
    divisors = [d for d in range(1, columns + 1) if columns % d == 0]
    best = min(divisors, key=lambda d: abs(log(d / size)))
    return spec.model_copy(update={"group_size": best}), {"block": f"{best}: {size} does not divide {columns}"}
