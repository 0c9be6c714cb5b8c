"""AWQ: scale up the input channels that matter, so that their weights round more finely, then clip ranges.

Source: Lin et al., AWQ: Activation-aware Weight Quantization, MLSys 2024, arXiv 2306.00978, and the released code: for
layers behind a norm, or behind a layer whose output they read, the scale is m^alpha of the mean input magnitudes m,
with alpha from 20 values between 0 and 1 by the squared error of what follows, with rounding to nearest; then the clip
search of every layer but query and key; asymmetric groups of 128 with clamped integer zero-points.
Departs from the released code: layers behind a norm are judged by their own outputs, from the Gram, or by the block's
(`judge="block"`), where the code takes the attention's or the MLP's; layers are paired by probing, not by lists of
names; a fold that changes the block's output is undone, and remarked.
[choice] `rounding="columns"` puts GPTQ behind scales and clips.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.folding import fold_chain, fold_link, on_trial
from dither.formats.fit import fit_grid
from dither.formats.spec import QuantSpec, spec_field
from dither.methods.base import Method
from dither.models.links import Chain, Link, first_tensor
from dither.solvers.clip import clip_range
from dither.solvers.rounding import Rounding, round_weight
from dither.statistics.gram import Gram
from dither.statistics.magnitude import Magnitude
from dither.transforms.equalize import awq_scale, equalization
from dither.walk import Block

ClampedSpec = Annotated[QuantSpec, spec_field("int4:channel:asym:tight:clampzero")]
Weights = dict[str, Float[Tensor, "o i"]]


@dataclass(frozen=True)
class Seen:
    """What the search knows of an input: its Gram and mean magnitudes."""

    gram: Gram
    magnitude: Magnitude

    def merge(self, other: "Seen") -> "Seen":
        """Of both."""
        return Seen(self.gram.merge(other.gram), self.magnitude.merge(other.magnitude))


class AWQ(Method):
    """Activation-aware scales and clipped ranges."""

    name: ClassVar[str] = "awq"
    shards: ClassVar[bool] = True
    weights: ClampedSpec = Field(default="int4:g128", description="what layers are stored as")  # type: ignore[assignment]
    overrides: dict[str, ClampedSpec] = Field(default={}, description="other weight formats by name or pattern")
    alphas: Annotated[int, Field(ge=1)] = 20  # released code: n_grid
    judge: Literal["layers", "block"] = Field(default="layers", description="whose output chooses the scale of a norm")
    clip: bool = Field(default=True, description="search the ranges of groups")
    unclipped: tuple[str, ...] = Field(
        default=("*q_*", "*k_*", "*query*", "*key*", "*Wqkv*"),  # released code
        description="layers, by their own name, whose ranges are their extremes",
    )
    rounding: Rounding = Field(default="nearest", description="nearest codes or GPTQ's")
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Scale, fold, measure; then clip and round each layer on its own."""
        for block in blocks:
            self.equalize(block)
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def equalize(self, block: Block) -> None:
        """Fold the best scale of each norm, and of each layer that others read, into it and its readers."""
        links = block.links()
        pairs: list[Link | Chain] = [*links.found, *_one_for_each(block.chains())]
        inputs = "quantized" if self.inputs == "both" else self.inputs
        seen = block.observe({pair.layers[0]: _seen for pair in pairs}, inputs) if pairs else {}
        block.remarks |= {name: f"not equalized: {reason}" for name, reason in links.refused.items()}
        for pair in pairs:
            magnitude = seen[pair.layers[0]].magnitude.mean.float()
            alpha = self.best_alpha(block, pair, seen[pair.layers[0]])
            scale, name = awq_scale(magnitude, alpha), pair.norm if isinstance(pair, Link) else pair.source
            if isinstance(pair, Link):
                kept = alpha == 0 or fold_link(block, pair, equalization(scale))
            else:
                kept = alpha == 0 or fold_chain(block, pair, scale)
            done = f"equalized with {', '.join(block.local(one) for one in pair.layers)}: alpha {alpha:g}"
            block.remarks[name] = done if kept else "not equalized: the fold changed the block's output"

    def best_alpha(self, block: Block, pair: Link | Chain, seen: Seen) -> float:
        """The exponent whose scaled, rounded and unscaled weights do the least harm."""
        weights = {name: block.weight(name) for name in pair.layers if name in block.unit.layers}
        if self.judge == "block" and isinstance(pair, Link):
            error = partial(_block_error, block, [first_tensor(output).float() for output in block.outputs()])
        else:
            error = partial(_layer_error, weights, seen.gram.quantized.float())
        errors = {}
        for alpha in (step / self.alphas for step in range(self.alphas)):
            scale = awq_scale(seen.magnitude.mean.float(), alpha)
            scaled = {name: weight * scale for name, weight in weights.items()}
            errors[alpha] = error({n: fit_grid(w, self.weight_spec(n)).round(w) / scale for n, w in scaled.items()})
        return block.team.agree(lambda: min(errors, key=lambda alpha: errors[alpha]))

    def solve(self, task: LayerTask) -> LayerSolution:
        """One layer: the clip search, then rounding."""
        columns, spec = task.columns, self.weight_spec(task.name)
        gram = None if task.gram is None else task.gram.quantized[:columns, :columns]
        own = task.name.rpartition(".")[2]
        clipped = self.clip and spec.kind == "int" and not any(fnmatchcase(own, pattern) for pattern in self.unclipped)
        grid = clip_range(task.weight, spec, gram) if clipped else fit_grid(task.weight, spec)
        stored, notes = round_weight(task.weight, gram, grid, self.rounding, self.damping, self.act_order)
        return LayerSolution(stored, task.bias, notes | {"clipped": clipped})


def _one_for_each(chains: list[Chain]) -> list[Chain]:
    """The last source of every layer: of a gate and a value that both pass through, the value."""
    return list({layer: chain for chain in chains for layer in chain.layers if len(chain.layers) == 1}.values())


def _seen(given: Float[Tensor, "*b i"], original: Float[Tensor, "*b i"]) -> Seen:
    return Seen(Gram.of(given), Magnitude.of(given))


def _layer_error(true: Weights, gram: Float[Tensor, "i i"], rounded: Weights) -> float:
    """Squared error of the layers' own outputs."""
    changes = [rounded[name] - weight for name, weight in true.items()]
    return sum(float(((change @ gram) * change).sum()) for change in changes)


def _block_error(block: Block, true: list[Float[Tensor, "..."]], rounded: Weights) -> float:
    """Squared error of the block's output on all calibration data."""
    with on_trial(block, rounded):
        pairs = zip(true, block.outputs(), strict=True)
        return block.total(float((first_tensor(output).float() - here).square().sum()) for here, output in pairs)
