"""UDFC: prune channels and quantize at once, without data; the next layer absorbs what is lost, in closed form.

Source: Bai et al., Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning, ICCV 2023, arXiv
2308.07209. Its code could not be read: structure, a = 0.01 and b = 0.008 are as others report them; the algebra in
`solvers/absorption.py` follows from its assumption that a damaged channel is a linear combination of those left.
Choice: channels of least L2 norm go, the same share in every chain; RTN with symmetric ranges of each row; activations
are kept unless asked for. Chains are found by probing (`models/channels.py`); layers tied by a residual stay.
Ours: chains through a depthwise convolution (inner products of composed filters); `bias_correct`, which takes back the
mean that pruning removes, by the moments that the batch normalization stored; `prior="identity"`, which regularizes a
channel that is left towards itself; `relative`. The preset `udfc-corrected` has all of these, with a ridge chosen on
training pictures; nobody published it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.folding import bias_of
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.methods.base import Method, WeightSpec
from dither.models.batchnorm import few
from dither.models.channels import ChannelChain, expected_inputs, find_channel_chains
from dither.models.distil import Distillation
from dither.models.layers import is_layer, weight_matrix
from dither.models.preparing import Prepared, Subject
from dither.models.pruning import keep_channels, set_reader
from dither.nn.batchnorm import FoldedNorm
from dither.solvers.absorption import Filters, absorbed, absorption, selection
from dither.walk import Block

_OWN_SHARE = 0.9  # median coefficient of a kept channel for itself, below which the report says so


class UDFC(Method):
    """Pruning and rounding, absorbed by the next layer; needs no data where activations are kept."""

    name: ClassVar[str] = "udfc"
    shards: ClassVar[bool] = True
    weights: WeightSpec = Field(default=QuantSpec.parse("int6:channel:sym:minmax"), description="what layers become")
    prune: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="share of channels to remove")
    absorb: bool = Field(default=True, description="false: prune and round, and let nothing make up for it")
    offset_weight: Annotated[float, Field(ge=0)] = 0.01  # the paper's alpha 1, as reported
    ridge: Annotated[float, Field(ge=0)] = 0.008  # the paper's alpha 2, as reported
    relative: bool = Field(default=False, description="ridge in units of the mean squared norm of a filter")
    prior: Literal["zero", "identity"] = Field(default="zero", description="what the ridge draws coefficients to")
    bias_correct: bool = Field(default=False, description="take the mean that is lost back into the next bias")
    distillation: Distillation = Field(default=Distillation(), description="pictures for ranges, with activations")

    def without_data(self) -> Distillation:
        """Noise, to see how the layers hang together; distilled pictures where ranges of activations are needed."""
        return Distillation(count=2, steps=0) if self.activations is None else self.distillation

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Round what `prepare` has made of the weights."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """The nearest codes of one layer."""
        return LayerSolution(self.rounded(task.name, task.weight), task.bias)

    def rounded(self, name: str, weight: Float[Tensor, "o i"]) -> Any:
        """A weight's nearest codes."""
        return quantize(weight, fit_grid(weight, self.weight_spec(name)))

    def prepare(self, subject: Subject) -> Prepared:
        """Chain by chain, front to back: choose channels, solve for coefficients, change the next layer."""
        if not self.prune and not self.absorb:
            return Prepared()
        batch, model = subject.batches[0], subject.model
        chains, remarks = find_channel_chains(
            model, lambda: subject.run(few(batch)), lambda: subject.run(_other(few(batch)))
        )
        norms = {norm.layer: norm for norm in model.modules() if isinstance(norm, FoldedNorm)}
        rows: list[dict[str, Any]] = []
        for number, chain in enumerate(chains):
            missing = [n for n in (chain.source, *chain.through, *chain.readers) if n not in subject.anatomy.layers]
            if missing:
                remarks[chain.source] = f"not pruned: {missing[0]} stays in full precision"
                continue
            damage = self.damage(subject, chain, norms)
            compress(model, chain, damage)
            rows.append({"name": chain.source, "before": damage.before, "after": len(damage.kept), **damage.facts})
            remarks[chain.source] = _remark(chain, damage)
            subject.say("pruning", number + 1, len(chains))
        return Prepared(remarks=remarks, facts={"pruning": {"share": self.prune, "layers": rows}})

    def damage(self, subject: Subject, chain: ChannelChain, norms: dict[str, FoldedNorm]) -> "Damage":
        """Which channels of a chain stay, and what the readers make of them."""
        model = subject.model
        weight, norm = _matrix(model, chain.source), norms.get(chain.last)
        kept = strongest(filter_norms(model, chain, norms), round(len(weight) * (1 - self.prune)) or 1)
        facts: dict[str, Any] = {"readers": list(chain.readers)}
        if self.absorb:
            coefficients = self.coefficients(model, chain, kept)
            facts["own_share"] = float(coefficients[kept].diagonal().median())
        else:
            coefficients = selection(kept, len(weight))
        means = None
        if self.bias_correct and self.absorb:
            if norm is None or norm.mean is None or norm.deviation is None:
                facts["bias"] = "not corrected: no batch normalization told of its outputs"
            else:
                batch, reader = subject.batches[0], chain.readers[0]
                means = expected_inputs(
                    model, lambda n: subject.run(_repeated(batch, n)), chain.last, reader, norm.mean, norm.deviation
                ).to(weight)
        return Damage(kept, coefficients, means, len(weight), facts)

    def coefficients(self, model: nn.Module, chain: ChannelChain, kept: Int[Tensor, " m"]) -> Float[Tensor, "c m"]:
        """The closed form; a channel that is left exactly as it was stands for itself."""
        found: Filters | None = None
        intact = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        for name in (chain.source, *chain.through):
            weight = _matrix(model, name)
            stored = self.rounded(name, weight[kept]).dequantize()
            intact &= (stored == weight[kept]).all(dim=1)
            bias = _offsets(model, name, weight)
            one = Filters.of(weight, bias, stored, bias[kept])
            found = one if found is None else one.behind(found)
        if found is None:
            raise TypeError("a chain has a source")
        solved = absorption(
            found, kept, self.offset_weight, self.ridge, self.relative, identity=self.prior == "identity"
        )
        same = selection(kept, len(solved)).to(solved)
        solved[kept[intact]] = same[kept[intact]]
        return solved


@dataclass(frozen=True)
class Damage:
    """Channels [m] that stay of a chain, coefficients [c, m] of all over them, and the mean of each at the readers."""

    kept: Int[Tensor, " m"]
    coefficients: Float[Tensor, "c m"]
    means: Float[Tensor, " c"] | None
    before: int
    facts: dict[str, Any] = field(default_factory=dict)


def filter_norms(model: nn.Module, chain: ChannelChain, norms: dict[str, FoldedNorm]) -> Float[Tensor, " c"]:
    """The L2 norm of each filter, before its normalization was folded in; a product where there are several."""
    size = torch.ones(())
    for name in (chain.source, *chain.through):
        found, norm = _matrix(model, name).norm(dim=1), norms.get(name)
        if norm is not None and norm.scale is not None:
            found = found / norm.scale.abs().to(found).clamp_min(1e-12)
        size = size.to(found) * found
    return size


def strongest(score: Float[Tensor, " c"], count: int) -> Int[Tensor, " m"]:
    """The places of the largest scores, in order."""
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values


def compress(model: nn.Module, chain: ChannelChain, damage: Damage) -> None:
    """Cut the channels and let the readers absorb them: W' = W S, b' = b + W m - W' m_kept."""
    for name in chain.readers:
        weight = model.get_submodule(name).get_parameter("weight").detach()
        moved = absorbed(weight.float(), damage.coefficients)
        shift = None
        if damage.means is not None:
            shift = _summed(weight.float()) @ damage.means - _summed(moved) @ damage.means[damage.kept]
        set_reader(model, name, moved, shift)
    keep_channels(model, chain, damage.kept)


def _summed(weight: Float[Tensor, "o c *k"]) -> Float[Tensor, "o c"]:
    return weight.flatten(2).sum(dim=2) if weight.ndim > 2 else weight


def _matrix(model: nn.Module, name: str) -> Float[Tensor, "o i"]:
    layer = model.get_submodule(name)
    if not is_layer(layer):
        raise TypeError(f"{name} is a {type(layer).__name__}, not a layer")
    return weight_matrix(layer, name)


def _offsets(model: nn.Module, name: str, weight: Float[Tensor, "o i"]) -> Float[Tensor, " o"]:
    bias = bias_of(model.get_submodule(name))
    return weight.new_zeros(len(weight)) if bias is None else bias


def _remark(chain: ChannelChain, damage: Damage) -> str:
    text = f"{len(damage.kept)} of {damage.before} channels are left; absorbed by {', '.join(chain.readers)}"
    if damage.facts.get("own_share", 1.0) < _OWN_SHARE:  # filters are short beside an absolute ridge
        text += (
            f"; the ridge draws channels to {damage.facts['own_share']:.2f} of themselves, which udfc-corrected avoids"
        )
    return text if "bias" not in damage.facts else f"{text}; bias {damage.facts['bias']}"


def _other(batch: Any) -> Any:
    """Other inputs of the same shapes."""
    if isinstance(batch, Tensor):
        return batch.roll(1, dims=-1) * 0.7 + 0.1 if batch.is_floating_point() else batch.roll(1, dims=-1)
    if isinstance(batch, dict):
        return {key: _other(part) for key, part in batch.items()}
    return type(batch)(_other(part) for part in batch) if isinstance(batch, list | tuple) else batch


def _repeated(batch: Any, count: int) -> Any:
    """The first sample of a batch, many times."""
    if isinstance(batch, Tensor):
        return batch[:1].expand(count, *batch.shape[1:])
    if isinstance(batch, dict):
        return {key: _repeated(part, count) for key, part in batch.items()}
    return type(batch)(_repeated(part, count) for part in batch) if isinstance(batch, list | tuple) else batch
