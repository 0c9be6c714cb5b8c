"""RTN: every weight goes to its nearest code. The baseline that needs nothing but the ranges of the inputs.

Source: common practice; ranges by percentile and squared error as in RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254).
Departs from: nothing; there is no paper to depart from.
"""

from collections.abc import Iterable
from typing import ClassVar

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.methods.base import Method
from dither.walk import Block


class RTN(Method):
    """Round weights to nearest; the bias stays in full precision."""

    name: ClassVar[str] = "rtn"
    shards: ClassVar[bool] = True

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Fit input ranges, round, store."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """The nearest codes of one layer."""
        return LayerSolution(quantize(task.weight, fit_grid(task.weight, self.weight_spec(task.name))), task.bias)
