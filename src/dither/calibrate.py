"""Steps on a block that methods share: quantize attention, reparameterize norms, fit ranges, measure, solve, store."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dither.engine.local import Engine
from dither.folding import bias_of, fold_link
from dither.formats.activation import Scales, covered_range, fit_activation
from dither.formats.qtensor import QTensor
from dither.formats.spec import QuantSpec
from dither.models.layers import groups_of
from dither.models.links import Link
from dither.nn.activation import ActivationQuantizer
from dither.nn.attention import AttentionOperands
from dither.statistics.extremes import MinMax
from dither.statistics.gram import Gram
from dither.statistics.grouped_gram import GroupedGram
from dither.statistics.sample import RowSample
from dither.statistics.sensitivity import Sensitivity
from dither.transforms.equalize import equalization
from dither.transforms.reparameterize import reparameterization
from dither.walk import Block, Inputs, LayerRecord

COLUMN_S = 4e-4  # measured: what a column costs a solver that goes column by column, apart from arithmetic
_RATES = {"cpu": 3e10, "cuda": 3e13}  # orders of magnitude: operations a second

BareNorm = Literal["refuse", "offset", "ratio"]
ChannelRanges = Callable[[Link, Float[Tensor, "n d"], QuantSpec], Scales]


@dataclass(frozen=True)
class LayerTask:
    """A layer to solve: its weight [o, i], bias and the Gram of its inputs (with ones appended if there is a bias).

    A grouped convolution has `grouped` instead, a Gram for each group. `sensitivity` is there where the method asked
    the loss for it.
    """

    name: str
    weight: Float[Tensor, "o i"]
    bias: Float[Tensor, " o"] | None
    gram: Gram | None
    reparameterized: bool = False
    sensitivity: Sensitivity | None = None
    grouped: GroupedGram | None = None

    @property
    def columns(self) -> int:
        """Number of weight columns, without the bias."""
        return self.weight.shape[1]

    @property
    def cost(self) -> float:
        """Seconds that a solver with a Gram takes, roughly; by it engines deal layers out evenly."""
        rows, columns = self.weight.shape
        work = 0 if self.gram is None else 3 * (columns**3 + 2 * rows * columns**2)
        return COLUMN_S * columns + work / _RATES.get(self.weight.device.type, 3e10)

    def with_bias(self) -> Float[Tensor, "o k"]:
        """Weight with the bias as its last column, in the Gram's dtype."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias[:, None]]
        dtype = torch.float64 if self.gram is None else self.gram.quantized.dtype
        return torch.cat(parts, dim=1).to(dtype)


@dataclass(frozen=True)
class LayerSolution:
    """Codes and bias of a solved layer, and what the solver noted."""

    weight: QTensor
    bias: Float[Tensor, " o"] | None
    notes: dict[str, Any] = field(default_factory=dict)
    time_s: float = 0.0


def quantize_operands(block: Block, specs: Mapping[str, QuantSpec | None], inputs: Inputs) -> None:
    """Fit and attach quantizers to the operands of every attention in the block."""
    for owner in block.unit.attention if any(specs.values()) else ():
        samples = block.observe_attention(owner, RowSample.of, inputs)
        quantizers = {}
        for operand, sample in samples.items():
            spec = specs.get(operand)
            if spec is None:
                continue
            quantizer = _fit(sample.rows, spec)
            quantizers[operand] = quantizer
            error = _relative_error(sample.rows, quantizer)
            row = {"name": owner, "operand": operand, "activations": str(spec), "error": error}
            block.operand_records.append(row)
        if quantizers:
            block.store_attention(owner, AttentionOperands(quantizers))


def reparameterize(
    block: Block,
    spec: QuantSpec,
    inputs: Inputs,
    round_zero_point: bool,
    ranges: ChannelRanges | None = None,
    bare: BareNorm = "refuse",
) -> dict[str, ActivationQuantizer]:
    """Fold per-channel ranges behind norms into the weights; returns the per-tensor quantizer of each layer reached.

    `ranges` finds scales and zero-points of the channels, by default as the format searches them. `bare` says what
    becomes of the shift of channels behind a norm that takes no bias: the norm is refused, the shift stays as an offset
    of the quantizers, or only the ratio of symmetric ranges is folded, and the quantizers are left to be fitted.
    A fold that changes the block's output is undone and its reason kept in the block's remarks.
    """
    links, quantizers = block.links(), dict[str, ActivationQuantizer]()
    block.remarks |= {name: f"not reparameterized: {reason}" for name, reason in links.refused.items()}
    per_channel = spec.model_copy(update={"granularity": "channel", "dynamic": False})
    for link in links.found:
        first = link.layers[0]
        rows = block.observe({first: _sample}, inputs)[first].rows
        scale, zero_point = fit_activation(rows, per_channel) if ranges is None else ranges(link, rows, per_channel)
        change = reparameterization(scale, zero_point, spec.symmetry != "asym", round_zero_point)
        offset, folded = None, fold_link(block, link, change)
        shifted = bias_of(block.reference.get_submodule(block.local(link.norm))) is None and bool(change.shift.any())
        if not folded and shifted and bare == "ratio":
            both = per_channel.model_copy(update={"symmetry": "sym"})
            scale, _ = fit_activation(rows, both) if ranges is None else ranges(link, rows, both)
            if fold_link(block, link, equalization(scale / scale.mean())):  # the range of all is fitted afterwards
                block.remarks[link.norm] = f"ratios of channels folded into {len(link.layers)} layers: it takes no bias"
                continue
        if not folded and shifted and bare == "offset" and fold_link(block, link, equalization(change.ratio)):
            folded, offset = True, -change.shift
        if not folded:
            hint = " (it takes no bias; a symmetric format needs none)" if shifted else ""
            block.remarks[link.norm] = f"not reparameterized: the fold changed the block's output{hint}"
            continue
        kept = "" if offset is None else "; it takes no bias, so the shift is added to the inputs of these"
        block.remarks[link.norm] = f"reparameterized with {len(link.layers)} layers{kept}"
        for name in link.layers:
            quantizer = ActivationQuantizer(spec).add(offset)
            # a dynamic range is not set, but gains from like channels too
            quantizers[name] = quantizer if spec.dynamic else quantizer.set((change.scale, change.zero_point))
    return quantizers


def measure(
    block: Block,
    specs: Mapping[str, QuantSpec | None],
    inputs: Inputs,
    fitted: Mapping[str, ActivationQuantizer],
    grams: bool = True,
) -> tuple[list[LayerTask], dict[str, ActivationQuantizer]]:
    """Fit the input quantizers that are still missing, then accumulate a Gram of each layer's quantized inputs.

    `specs` gives the input format of each layer to measure, None where the input stays in full precision. Returns what
    to solve and every layer's quantizer; layers whose outputs read different inputs have a Gram for each group.
    """
    quantizers = {name: fitted[name] for name in specs if name in fitted}
    first = _first_reader(block, specs, quantizers)
    readers = list(dict.fromkeys(first.values()))
    sampled = [name for name in readers if specs[name] is not None or not grams]
    whose: Inputs = "quantized" if inputs == "both" else inputs
    samples = block.observe(dict.fromkeys(sampled, _sample), whose) if sampled else {}
    for name, spec in specs.items():
        if spec is not None and name not in quantizers:
            twin = quantizers.get(first[name])
            quantizers[name] = _fit(samples[first[name]].rows, spec) if twin is None else twin.copy()
    observers = {
        name: partial(
            _gram, exact=name not in quantizers, ones=block.layer(name).bias is not None,
            groups=groups_of(block.layer(name)),
        )
        for name in readers
        if grams
    }  # fmt: skip
    found = block.observe(observers, inputs, quantizers) if observers else {}
    extremes = {n: one.extremes for n, one in found.items()} | {n: one.extremes for n, one in samples.items()}
    for name in specs:
        seen = extremes[first[name]]
        block.ranges[name] = float(seen.low.amin()), float(seen.high.amax())
    measured = {name: found[first[name]].gram for name in specs if first[name] in found}
    tasks = []
    for name in specs:
        gram = measured.get(name)
        whole, grouped = (gram, None) if not isinstance(gram, GroupedGram) else (None, gram)
        known = block.sensitivities.get(name)
        task = LayerTask(name, block.weight(name), bias_of(block.layer(name)), whole, name in fitted, known, grouped)
        tasks.append(task)
    return tasks, quantizers


@dataclass(frozen=True)
class _Seen:
    """Gram and range of a layer's inputs."""

    gram: Gram | GroupedGram
    extremes: MinMax

    def merge(self, other: "_Seen") -> "_Seen":
        gram: Gram | GroupedGram = self.gram.merge(other.gram)  # type: ignore[arg-type]  # both are of one layer
        return _Seen(gram, self.extremes.merge(other.extremes))


def _first_reader(
    block: Block, specs: Mapping[str, QuantSpec | None], fitted: Mapping[str, ActivationQuantizer]
) -> dict[str, str]:
    """For each layer the first that reads the same input on the same grid, so that it is measured once."""
    first = {name: name for name in specs}
    for group in block.groups():
        leaders: dict[tuple[bool, str, bytes], str] = {}
        for name in (name for name in group if name in specs):
            key = (block.layer(name).bias is not None, *_signature(specs[name], fitted.get(name)))
            first[name] = leaders.setdefault(key, name)
    return first


def _signature(spec: QuantSpec | None, fitted: ActivationQuantizer | None) -> tuple[str, bytes]:
    """What tells one input grid from another."""
    if fitted is None:
        return str(spec), b""
    return str(fitted.spec), b"".join(x.cpu().numpy().tobytes() for x in fitted.state_dict().values())


def solve_and_store(
    block: Block,
    tasks_: list[LayerTask],
    quantizers: Mapping[str, ActivationQuantizer],
    solve: Callable[[LayerTask], LayerSolution],
    engine: Engine,
) -> None:
    """Solve the layers, wherever the engine runs them, and put them into the network with their records.

    The list is emptied: a caller still holds it while the next block is measured, and Grams are large.
    """
    for task, solution in zip(tasks_, engine.map(partial(_timed, solve), tasks_), strict=True):
        quantizer = quantizers.get(task.name)
        record = _record(block, task, solution, quantizer)
        block.store(task.name, solution.weight, _stored_bias(solution, quantizer), quantizer, record)
    tasks_.clear()


def _stored_bias(solution: LayerSolution, quantizer: ActivationQuantizer | None) -> Float[Tensor, " o"] | None:
    """The bias that takes back what the input quantizer's offset adds: b - Ŵ offset."""
    if quantizer is None or quantizer.offset is None:
        return solution.bias
    added = solution.weight.dequantize(torch.float64) @ quantizer.offset.to(solution.weight.codes.device, torch.float64)
    return -added.float() if solution.bias is None else (solution.bias.double() - added).float()


def _timed(solve: Callable[[LayerTask], LayerSolution], task: LayerTask) -> LayerSolution:
    start = perf_counter()
    found = solve(task)
    return LayerSolution(found.weight, found.bias, found.notes, perf_counter() - start)


def _record(
    block: Block, task: LayerTask, solution: LayerSolution, quantizer: ActivationQuantizer | None
) -> LayerRecord:
    stored, layer = solution.weight.dequantize(torch.float64), block.layer(task.name)
    error = None
    gram = task.gram if task.grouped is None else task.grouped
    if gram is not None:
        columns = stored if solution.bias is None else torch.cat([stored, solution.bias[:, None].to(stored)], dim=1)
        error = gram.output_error(task.with_bias(), columns)
    power = task.weight.double().square().sum().clamp_min(1e-30)
    nbytes = solution.weight.nbytes + (0 if quantizer is None or quantizer.offset is None else quantizer.offset.nbytes)
    return LayerRecord(
        name=task.name,
        kind=type(layer).__name__,
        shape=solution.weight.shape,
        weights=str(solution.weight.spec),
        activations=None if quantizer is None else str(quantizer.spec),
        bits_per_weight=8 * nbytes / task.weight.numel(),
        nbytes=nbytes,
        output_error=error,
        weight_error=float((stored - task.weight).square().sum() / power),
        time_s=solution.time_s,
        input_range=block.ranges.get(task.name),
        clip_range=None if quantizer is None else covered_range(quantizer.scales, quantizer.spec),
        notes=solution.notes,
    )


def _sample(seen: Tensor, original: Tensor) -> RowSample:
    return RowSample.of(seen)


def _gram(seen: Tensor, original: Tensor, exact: bool, ones: bool, groups: int) -> _Seen:
    """Of inputs that have gone through their quantizer already, unless they are `exact`."""
    wide = seen.detach().float().reshape(-1, seen.shape[-1])
    low, high = wide.amin(dim=0), wide.amax(dim=0)
    gram: Gram | GroupedGram
    if groups > 1:
        gram = GroupedGram.of(seen, groups, None if original is seen else original, ones)
    elif original is not seen or not exact:
        gram = Gram.of(seen, original, ones)
    else:
        gram = Gram.of(seen, ones=ones, dtype=torch.float32)
    return _Seen(gram, MinMax(low, high))


def _fit(rows: Float[Tensor, "n d"], spec: QuantSpec) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(spec).to(rows.device)
    return quantizer if spec.dynamic else quantizer.set(fit_activation(rows, spec))


def _relative_error(rows: Float[Tensor, "n d"], quantizer: ActivationQuantizer) -> float:
    difference = quantizer(rows) - rows
    return float(difference.square().sum() / rows.square().sum().clamp_min(1e-30))
