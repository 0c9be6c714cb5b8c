"""SmoothQuant: move the outliers of activations behind norms into the weights that read them, then round both.

Source: Xiao et al., SmoothQuant, ICML 2023, arXiv 2211.10438, and the released code: s = max|x|^alpha / max|w|^(1 -
alpha) with alpha 0.5, over all layers behind a norm; weights in 8 bits, one symmetric range a row, activations in 8
bits, one symmetric range a token, both of 255 levels; query, key and value too.
Departs from the released code: layers are paired with norms by probing, not by lists of names; a fold that changes the
block's output is undone, and remarked; where attention can be quantized its probabilities are too, as with every method
(`probabilities="none"` keeps them).
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.folding import fold_link
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.methods.base import ActivationSpec, Method, WeightSpec
from dither.models.links import Link
from dither.statistics.extremes import MinMax
from dither.transforms.equalize import equalization, smooth_scale
from dither.walk import Block


class SmoothQuant(Method):
    """Smoothed activations and weights in 8 bits."""

    name: ClassVar[str] = "smoothquant"
    shards: ClassVar[bool] = True
    weights: WeightSpec = Field(  # type: ignore[assignment]
        default="int8:channel:sym:narrow:minmax", description="what layers are stored as"
    )
    activations: ActivationSpec = Field(  # type: ignore[assignment]
        default="int8:token:sym:narrow:minmax", description="inputs of layers; none keeps them"
    )
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(default=0.5, description="how much of the ranges moves")

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Smooth, measure, round."""
        for block in blocks:
            self.smooth(block)
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def smooth(self, block: Block) -> None:
        """Fold the scales of every norm into it and its layers."""
        links, inputs = block.links(), "quantized" if self.inputs == "both" else self.inputs
        seen = block.observe({link.layers[0]: _extremes for link in links.found}, inputs) if links.found else {}
        block.remarks |= {name: f"not smoothed: {reason}" for name, reason in links.refused.items()}
        for link in links.found:
            done = self.fold(block, link, seen[link.layers[0]])
            kept = f"smoothed with {len(link.layers)} layers"
            block.remarks[link.norm] = kept if done else "not smoothed: the fold changed the block's output"

    def fold(self, block: Block, link: Link, seen: MinMax) -> bool:
        """One norm; False if the block's output changed, which is then undone."""
        largest = torch.stack([block.weight(name).abs().amax(dim=0) for name in link.layers]).amax(dim=0)
        scale = smooth_scale(torch.maximum(seen.low.abs(), seen.high.abs()), largest, self.alpha)
        return fold_link(block, link, equalization(scale))

    def solve(self, task: LayerTask) -> LayerSolution:
        """The nearest codes of one layer."""
        return LayerSolution(quantize(task.weight, fit_grid(task.weight, self.weight_spec(task.name))), task.bias)


def _extremes(seen: Float[Tensor, "*b i"], original: Float[Tensor, "*b i"]) -> MinMax:
    return MinMax.of(seen)
