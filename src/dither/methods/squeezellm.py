"""SqueezeLLM: a table of levels for each row, weighted by how much the loss minds; the few weights that matter apart.

Source: Kim, Hooper, Gholami, Dong, Li, Shen, Mahoney and Keutzer, SqueezeLLM: Dense-and-Sparse Quantization, ICML 2024,
arXiv 2306.07629, sections 4.1 (k-means weighted by the diagonal Fisher information) and 4.2 (dense and sparse).
From the paper: 0.05 % of the weights of largest Fisher information and 0.40 % of largest magnitude stay in half
precision; one table of 2^bits levels a row. From the released code: Fisher information from 100 sequences of 512
tokens, one backward pass each; magnitudes are judged by one ratio of the interquartile range for the whole model, which
is tuned to the asked-for share.
Departs from the released code: k-means starts at a dynamic program's answer, not at random (`solvers/kmeans.py`); the
most sensitive weights are exactly as many as asked for; a kept weight's code is the nearest one, not zero's, so that
what is stored beside it is small; columns take 16 bits. Models other than language models are asked for the
cross-entropy to their own prediction.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind
from dither.methods.base import Method, WeightSpec
from dither.models.gradients import Gradients
from dither.solvers.levels import fit_levels
from dither.solvers.outliers import Spread, iqr_ratio, iqr_threshold, top_by_score
from dither.solvers.spqr import with_outliers
from dither.statistics.gradients import Fisher
from dither.statistics.sensitivity import Sensitivity
from dither.walk import Block


class SqueezeLLM(Method):
    """Sensitivity-weighted k-means; `sensitive` and `outliers` are shares of all weights, zero for dense alone."""

    name: ClassVar[str] = "squeezellm"
    shards: ClassVar[bool] = True
    backward: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("nuq",)
    weights: WeightSpec = Field(default="nuq4", description="what layers are stored as: nuq3, nuq4, …")  # type: ignore[assignment]
    samples: Annotated[int, Field(ge=1)] = Field(default=100, description="sequences whose gradients are taken")
    sensitive: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0005, description="share of each layer that is kept for its Fisher information"
    )
    outliers: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.004, description="share of the model that is kept for its magnitude"
    )

    def sensitivities(self, layers: Sequence[str], gradients: Gradients) -> Mapping[str, Sensitivity]:
        """Fisher information of every weight, and which weights are kept."""
        measured = gradients.accumulate(dict.fromkeys(layers, Fisher.of), self.samples)
        spreads = {name: Spread.of(gradients.weight(name)) for name in layers} if self.outliers else {}
        ratio = iqr_ratio(list(spreads.values()), self.outliers) if spreads else 0.0
        found = {}
        for name in layers:
            fisher = measured.pop(name).squares
            kept = top_by_score(fisher, self.sensitive) & (fisher > 0)
            if name in spreads:
                limit = iqr_threshold(spreads[name].first, spreads[name].third, ratio)
                kept |= gradients.weight(name).abs() >= limit
            found[name] = Sensitivity(fisher=fisher, kept=kept)
        return found

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure inputs for the report, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer; without sensitivity plain k-means, which the notes say."""
        spec = self.weight_spec(task.name)
        if task.sensitivity is None or task.sensitivity.fisher is None:
            return LayerSolution(
                quantize(task.weight, fit_levels(task.weight, spec, None)), task.bias, {"weighted": "no"}
            )
        fisher, kept = task.sensitivity.fisher, task.sensitivity.kept
        if kept is None or not bool(kept.any()):
            return LayerSolution(quantize(task.weight, fit_levels(task.weight, spec, fisher)), task.bias)
        dead = (fisher.masked_fill(kept, 0) == 0).all(dim=1, keepdim=True)  # such a row counts all it does not keep
        grid = fit_levels(task.weight, spec, torch.where(dead, 1.0, fisher).masked_fill(kept, 0))
        notes = {"outliers": float(kept.double().mean())}
        return LayerSolution(with_outliers(task.weight, grid, kept), task.bias, notes)
