"""RepQ-ViT: per-channel ranges behind LayerNorm become one range by a change of the norm and of the weights after it.

Source: Li et al., RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers, ICCV 2023,
arXiv 2212.08254. Softmax output in log-sqrt2 codes; weights to nearest.
Departs from the released code: ranges are taken from full-precision inputs, there each quantizer is initialised on
inputs that earlier quantizers have changed; the mean zero-point is rounded, so that an integer runtime can hold it
(`round_zero_point=False` restores the released behaviour); log codes keep their top code for zero; weight ranges are
searched over ERQ's longer list of percentiles.
"""

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.methods.base import ActivationSpec, Method
from dither.walk import Block


class RepQ(Method):
    """Reparameterize LayerNorm activations, then round weights to nearest."""

    name: ClassVar[str] = "repq"
    shards: ClassVar[bool] = True
    activations: ActivationSpec = Field(default="int4", description="inputs of layers; none keeps them")  # type: ignore[assignment]
    round_zero_point: bool = True

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Fit per-channel ranges, fold them, round what came out."""
        for block in blocks:
            tasks, quantizers = self.measure(block, reparameterized=True, round_zero_point=self.round_zero_point)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """The nearest codes of one layer."""
        return LayerSolution(quantize(task.weight, fit_grid(task.weight, self.weight_spec(task.name))), task.bias)
