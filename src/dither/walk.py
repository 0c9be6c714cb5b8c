"""The walk over a model: unit by unit in execution order, with what each unit sees in full precision and quantized.

`walk` yields a `Block` at a time. A method measures its inputs, folds transforms and stores layers; when it asks for
the next block, the finished one is handed to `on_done` (which writes it) and the passes move on.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from dither.engine.team import ALONE, S, Team
from dither.errors import InputError, NonFiniteError
from dither.formats.qtensor import QTensor
from dither.heap import give_back_freed, give_back_mapped, ranges_of
from dither.models.anatomy import Anatomy, Unit
from dither.models.forward import Stream, layer_inputs, suspended_at
from dither.models.gradients import Gradients
from dither.models.layers import Layer, input_rows, is_layer, is_routed, quantized, weight_matrix
from dither.models.links import Chain, Links, find_chains, find_links, shared_inputs
from dither.models.spill import Spill, tensors_in
from dither.nn.activation import ActivationQuantizer
from dither.nn.attention import AttentionOperands, operands_seen, quantize_attention
from dither.nn.experts import everyone_called
from dither.nn.linear import cache_weights
from dither.statistics.sensitivity import Sensitivity
from dither.statistics.total import Total

Inputs = Literal["fp", "quantized", "both"]
_STREAMS: dict[Inputs, tuple[str, ...]] = {
    "fp": ("fp",), "quantized": ("quantized",), "both": ("fp", "quantized")
}  # fmt: skip

Measure = Callable[[Tensor, Tensor], S]  # (input that the quantized layer sees, full-precision input) → statistic


@dataclass
class LayerRecord:
    """What the report says about a stored layer."""

    name: str
    kind: str
    shape: tuple[int, int]
    weights: str
    activations: str | None
    bits_per_weight: float
    nbytes: int
    output_error: float | None
    weight_error: float
    time_s: float
    input_range: tuple[float, float] | None = None
    clip_range: tuple[float, float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Block:
    """One unit during its visit: `module` becomes quantized, `reference` stays in full precision."""

    unit: Unit
    module: nn.Module
    reference: nn.Module
    streams: Mapping[str, Stream]
    parent: nn.Module
    entry: str  # the layer that reads the network's own input
    backward: Gradients
    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)  # of layers, found before the walk
    records: list[LayerRecord] = field(default_factory=list)
    operand_records: list[dict[str, Any]] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)  # module name → what was done to it, or why not
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # layer → extremes of its input
    originals: list[Any] | None = None  # the full-precision outputs of all batches, parked
    team: Team = ALONE  # who has the other batches

    def layer(self, name: str) -> Layer:
        """The full-precision layer of a full name."""
        module = self.reference.get_submodule(self.local(name)) if self.local(name) else self.reference
        if not is_layer(module):
            raise TypeError(f"{name} is a {type(module).__name__}, not a layer")
        return module

    def local(self, name: str) -> str:
        """A full module name as seen from the block."""
        return name.removeprefix(self.unit.name).removeprefix(".")

    def full(self, name: str) -> str:
        """The full name of a module named from the block."""
        return f"{self.unit.name}.{name}" if name else self.unit.name

    def weight(self, name: str) -> Float[Tensor, "o i"]:
        """The layer's weight as a float32 matrix, checked to be finite."""
        return weight_matrix(self.layer(name), name)

    def observe(
        self,
        measures: Mapping[str, Measure[S]],
        inputs: Inputs = "fp",
        quantizers: Mapping[str, ActivationQuantizer] | None = None,
    ) -> dict[str, S]:
        """Run the batches through the block and accumulate a statistic of each named layer's input.

        `inputs` says whose: of the full-precision model, of the quantized prefix, or both as (seen, original); of an
        expert only what it sees, as the full-precision model routes other tokens to it. What a layer sees has gone
        through its quantizer where it has one among `quantizers`: before patches are cut, so padding stays zero.

        Raises:
            NonFiniteError: NaN or Inf arrives at a layer; the message names it.
            InputError: the walk was started for other inputs.
        """
        self.check(inputs)
        fitted = quantizers or {}
        results = self._observe(measures, inputs, fitted)
        if unseen := [name for name in measures if name not in results]:
            with everyone_called(self.module, self.reference):
                results |= self._observe({name: measures[name] for name in unseen}, inputs, fitted)
            self.remarks |= dict.fromkeys(unseen, "the router chose it for no calibration token: measured on all")
        if unseen := [name for name in measures if name not in results]:
            raise InputError(f"{unseen[0]} is not called on any calibration batch; skip it, or give other data")
        return results

    def _observe(
        self, measures: Mapping[str, Measure[S]], inputs: Inputs, quantizers: Mapping[str, ActivationQuantizer]
    ) -> dict[str, S]:
        def parts(seen: dict[str, list[Tensor]], original: dict[str, list[Tensor]]) -> Iterator[tuple[str, S]]:
            for name, measure in measures.items():
                layer, given = self.layer(name), seen.get(name, [])
                for x, true in zip(given, given if is_routed(layer) else original[name], strict=True):
                    quantizer = quantizers.get(name)
                    kept = x if quantizer is None else quantizer.approximate(x.float())
                    rows = input_rows(layer, kept)
                    try:
                        yield name, measure(rows, rows if true is kept else input_rows(layer, true))
                    except NonFiniteError as error:
                        raise NonFiniteError(f"input of {name}: {error}") from None

        return self.team.merge(parts(*passed) for passed in self._passes(list(measures), inputs))

    def check(self, inputs: Inputs) -> None:
        """Refuse inputs that the walk was not started for."""
        if any(name not in self.streams for name in _STREAMS[inputs]):
            raise InputError(f"{inputs!r} inputs were not walked, only {', '.join(self.streams)}; set inputs={inputs}")

    def _passes(self, names: list[str], inputs: Inputs) -> Iterator[tuple[dict[str, list[Tensor]], ...]]:
        if inputs == "both":
            pairs = (("quantized", self.module), ("fp", self.reference))
            yield from zip(*(self._inputs(names, stream, module) for stream, module in pairs), strict=True)
        else:
            module = self.reference if inputs == "fp" else self.module
            yield from ((seen, seen) for seen in self._inputs(names, inputs, module))

    def _inputs(self, names: list[str], stream: str, module: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        layers = {name: module.get_submodule(self.local(name)) if self.local(name) else module for name in names}
        yield from layer_inputs(self.streams[stream], module, layers)

    def gradients(self, measures: Mapping[str, Callable[[Tensor], S]], samples: int | None = None) -> dict[str, S]:
        """Accumulate a statistic of the gradient of each named layer's weight, behind the quantized prefix.

        The whole network runs, forward and backward, on the first `samples` samples, one by one; units that the walk
        has not reached are in full precision. Layers that are stored already have no gradient.

        Raises:
            NonFiniteError: NaN or Inf in an input, the loss or a gradient; the message names the layer.
            InputError: the weights are not all in memory.
        """
        return self.backward.accumulate(measures, samples)

    def observe_attention(self, owner: str, measure: Callable[[Tensor], S], inputs: Inputs = "fp") -> dict[str, S]:
        """Accumulate a statistic of each operand of the attention that `owner` computes."""
        self.check(inputs)
        parts: list[tuple[str, S]] = []

        def handle(name: str, x: Tensor) -> Tensor:
            try:
                parts.append((name, measure(x)))
            except NonFiniteError as error:
                raise NonFiniteError(f"attention {name} of {owner}: {error}") from None
            return x

        def taken() -> list[tuple[str, S]]:
            batch, parts[:] = list(parts), []
            return batch

        stream, module = ("fp", self.reference) if inputs == "fp" else ("quantized", self.module)
        with operands_seen(module.get_submodule(self.local(owner)) if self.local(owner) else module, handle):
            return self.team.merge(taken() for _ in self.streams[stream].run(module))

    def total(self, errors: Iterable[float]) -> float:
        """The sum over all batches, wherever they are; `errors` are of the batches of `outputs` or a stream's `run`."""
        return self.team.merge([("", Total(error))] for error in errors)[""].value

    def links(self) -> Links:
        """Norms and the layers that read nothing else, by full names."""
        found = self.team.agree(lambda: find_links(self.reference, self.once))
        links = Links(refused={self.full(name): reason for name, reason in found.refused.items()})
        links.found = [
            type(link)(self.full(link.norm), tuple(self.full(name) for name in link.layers)) for link in found.found
        ]
        return links

    def chains(self) -> list[Chain]:
        """Layers and those that read their outputs channel by channel, by full names."""
        found = self.team.agree(lambda: find_chains(self.reference, self.once))
        return [Chain(self.full(one.source), tuple(self.full(name) for name in one.layers)) for one in found]

    def groups(self) -> list[tuple[str, ...]]:
        """The layers in execution order, those that read the same input together."""
        layers = {name: self.layer(name) for name in self.unit.layers}
        found = self.team.agree(lambda: shared_inputs(layers, self._sample))
        shared = {name: group for group in found for name in group}
        groups = [shared.get(name, (name,)) for name in self.unit.layers]
        return list(dict.fromkeys(groups))

    def outputs(self) -> Generator[Any, None, None]:
        """The full-precision block's output for each batch of this process."""
        return next(iter(self.streams.values())).run(self.reference)

    def once(self) -> Any:
        """The full-precision block's output for the first batch here; what follows from it is to be agreed on."""
        return next(iter(self.streams.values())).once(self.reference)

    def _sample(self) -> Any:
        """The full-precision block's output for one sample: enough to see which layers read the same."""
        return next(iter(self.streams.values())).call(self.reference, [0])

    def store(
        self,
        name: str,
        weight: QTensor,
        bias: Tensor | None,
        quantizer: ActivationQuantizer | None,
        record: LayerRecord,
    ) -> None:
        """Put the quantized layer into the network."""
        replacement = quantized(self.layer(name), weight, bias, quantizer).to(weight.codes.device)
        local = self.local(name)
        if local:
            holder, _, leaf = local.rpartition(".")
            setattr(self.module.get_submodule(holder) if holder else self.module, leaf, replacement)
        else:
            setattr(self.parent, self.unit.name.rpartition(".")[2], replacement)
            self.module = replacement
        self.records.append(record)

    def store_attention(self, owner: str, operands: AttentionOperands) -> None:
        """Let an attention module compute with quantized operands."""
        quantize_attention(self.module.get_submodule(self.local(owner)) if self.local(owner) else self.module, operands)


def walk(
    model: nn.Module,
    anatomy: Anatomy,
    run: Callable[[Any], Any],
    batches: Sequence[Any],
    inputs: Inputs,
    spill_budget: int = 2**30,
    restore: Callable[[Unit], bool] = lambda unit: False,
    on_done: Callable[[Block], None] = lambda block: None,
    load: Callable[[str], None] = lambda unit: None,
    gradients: Gradients | None = None,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    team: Team = ALONE,
) -> Iterator[Block]:
    """Visit the units of `model`, which is quantized in place.

    `run` calls the model on a batch. `load` brings a unit's tensors into memory. `restore` puts a unit's earlier result
    into the model and says so; such a unit is not yielded. `on_done` gets every finished block. Activations beyond
    `spill_budget` bytes wait on disk. Blocks ask `gradients` (by default of the model's natural loss) for theirs, and
    have the `sensitivities` of their layers, by name. A `team` shares the batches, but not those of `gradients`.
    """
    names = _STREAMS[inputs]
    units = {unit.name: unit for unit in anatomy.units}
    streams: dict[str, Stream] = {}
    backward = Gradients(model, run, batches) if gradients is None else gradients
    known = {} if sensitivities is None else sensitivities
    block = partial(Block, streams=streams, entry=anatomy.entry, backward=backward, sensitivities=known, team=team)
    own = team.share(batches)
    with Spill(spill_budget, _read_meanwhile(model, batches)) as spill, suspended_at(model, list(units)):
        try:
            for name in names:
                streams[name] = Stream(run, own or batches[:1], spill, idle=not own)
            left = dict(units)
            while left and (current := streams[names[0]].unit) is not None:
                load(current)
                unit = left.pop(current)  # behind the last one nothing is run: a head's logits would fill the memory
                yield from _visit(model, unit, streams, block, restore, on_done, last=not left)
        finally:
            for stream in streams.values():
                stream.close()


def _read_meanwhile(model: nn.Module, batches: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors that others read while activations wait; nobody here may hold them, or stored layers free no memory."""
    yield from (*model.parameters(), *model.buffers(), *tensors_in(list(batches)))


def _visit(
    model: nn.Module,
    unit: Unit,
    streams: dict[str, Stream],
    make: Callable[..., Block],
    restore: Callable[[Unit], bool],
    on_done: Callable[[Block], None],
    last: bool,
) -> Iterator[Block]:
    module, holder = model.get_submodule(unit.name), unit.name.rpartition(".")[0]
    reference, read = _reference(module), ranges_of(module.parameters())
    outputs = {"fp": streams["fp"].outputs(reference)} if "fp" in streams else {}
    if restore(unit):
        module = model.get_submodule(unit.name)
    else:
        parent = model.get_submodule(holder) if holder else model
        block = make(unit=unit, module=module, reference=reference, parent=parent, originals=outputs.get("fp"))
        yield block
        module = block.module
        block.team.align_(module)
        on_done(block)
        block.reference = module  # the method still holds the block when the next one is read
    del reference
    give_back_freed()
    give_back_mapped(read)
    if last:
        return
    if "fp" in streams:
        streams["fp"].resume(outputs.pop("fp"))
    if "quantized" in streams:
        streams["quantized"].advance(cache_weights(module))
        cache_weights(module, cached=False)


def _reference(module: nn.Module) -> nn.Module:
    """A full-precision copy that runs when called (the live module's `forward` suspends passes)."""
    forward = module.__dict__.pop("forward")
    try:
        return deepcopy(module)
    finally:
        module.forward = forward
