"""HQQ: zero-points by half-quadratic splitting, without any data; then every weight goes to its nearest code.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023 (a report, not on arXiv),
and the released code: norm 0.7, beta 10, 20 steps, real zero-points, 4 bits in groups of 64 along the inputs.
Departs from the released code: `kappa` is in effect, as in the report (the code's default path leaves beta as it is);
each group keeps its best zero-point; scales and zero-points are stored in float16.
[choice] Formats without real zero-points are rounded to nearest as they are, which notes say.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_uniform
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind, QuantSpec, spec_field
from dither.methods.base import Method
from dither.solvers.half_quadratic import has_real_zero_points, split_half_quadratic, with_zero_point
from dither.walk import Block

ROUNDED = 4  # bits at which the released code begins with whole zero-points, so that zero has a code of its own
RealZeroSpec = Annotated[QuantSpec, spec_field("int4:channel:asym:tight:realzero")]


class HQQ(Method):
    """Half-quadratic quantization; calibration data only measure the error that the report shows."""

    name: ClassVar[str] = "hqq"
    shards: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("int",)
    weights: RealZeroSpec = Field(default="int4:g64", description="what layers are stored as")  # type: ignore[assignment]
    overrides: dict[str, RealZeroSpec] = Field(default={}, description="other weight formats by name or pattern")
    norm: Annotated[float, Field(gt=0, lt=2)] = 0.7
    beta: Annotated[float, Field(gt=0)] = 10.0
    kappa: Annotated[float, Field(ge=1)] = 1.01
    iterations: Annotated[int, Field(ge=1)] = 20
    round_zero: bool | Literal["auto"] = Field(
        default="auto", description="begin with whole zero-points; auto does so at 4 bits, as the released code"
    )

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Fit input ranges, move zero-points, round, store."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def alone(self, spec: QuantSpec) -> Callable[[LayerTask], LayerSolution] | None:
        """The solver, which looks at no data."""
        return self.model_copy(update={"weights": spec, "overrides": {}}).solve

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer: the grid of its extremes, better zero-points, nearest codes."""
        grid = fit_uniform(task.weight, self.weight_spec(task.name))
        rounds = grid.spec.bits == ROUNDED if self.round_zero == "auto" else self.round_zero
        if rounds and has_real_zero_points(grid.spec):
            grid = with_zero_point(grid, grid.zero_point.round())
        notes = {} if has_real_zero_points(grid.spec) else {"zero_point": "not real in this format"}
        moved = split_half_quadratic(task.weight, grid, self.norm, self.beta, self.kappa, self.iterations)
        return LayerSolution(quantize(task.weight, moved), task.bias, notes)
