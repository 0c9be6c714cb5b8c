"""The walk: what each unit sees in full precision and behind the quantized prefix, and what the walk leaves behind."""

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.conftest import randomize
from torch import Tensor, nn

import dither
from dither.errors import InputError, NonFiniteError
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.models.anatomy import Anatomy, Unit, read_anatomy
from dither.models.network import Network
from dither.walk import Block, LayerRecord, walk

COARSE = QuantSpec.parse("int2:asym")


@dataclass(frozen=True)
class Rows:
    """All inputs that a layer saw, in order."""

    seen: tuple[Tensor, ...]
    original: tuple[Tensor, ...]

    @classmethod
    def of(cls, seen: Tensor, original: Tensor) -> "Rows":
        return cls((seen.clone(),), (original.clone(),))

    def merge(self, other: "Rows") -> "Rows":
        return Rows(self.seen + other.seen, self.original + other.original)


class Bench:
    """A network, its calibration batches, and a walk over both."""

    def __init__(self, network: Any, batches: list[Any]) -> None:
        self.network, self.batches = network, batches
        self.model = copy.deepcopy(network.model)
        self.run = Network(self.model, "tiny").run
        self.anatomy: Anatomy = read_anatomy(self.model, lambda: self.run(batches[0]))

    def walk(self, inputs: str, **options: Any) -> Iterator[Block]:
        with torch.no_grad():
            yield from walk(self.model, self.anatomy, self.run, self.batches, inputs, **options)  # type: ignore[arg-type]

    def inputs_of(self, model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
        """What arrives at each layer's place when the model is run from scratch."""
        seen: dict[str, tuple[Tensor, ...]] = dict.fromkeys(self.anatomy.layers, ())
        handles = []
        for name in seen:

            def keep(_module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                seen[name] += (args[0].clone(),)

            handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
        for batch in self.batches:
            self.network.logits(batch, model)
        for handle in handles:
            handle.remove()
        return seen


def store(block: Block, name: str, spec: QuantSpec = COARSE) -> None:
    weight = block.weight(name)
    stored = quantize(weight, fit_grid(weight, spec))
    record = LayerRecord(name, "Linear", stored.shape, str(spec), None, 2.0, stored.nbytes, None, 0.0, 0.0)
    block.store(name, stored, block.layer(name).bias, None, record)


def store_all(block: Block) -> None:
    for name in block.unit.layers:
        store(block, name)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(params=["ViTForImageClassification", "LlamaForCausalLM", "odd"])
def bench(request: pytest.FixtureRequest, tiny: Callable[..., Any], odd: Callable[..., Any]) -> Bench:
    network = odd() if request.param == "odd" else tiny(request.param)
    return Bench(network, [network.batch(2, seed=1), network.batch(3, seed=2)])


def linear(bench: Bench, names: tuple[str, ...]) -> list[str]:
    """Layers whose rows are their inputs as they are."""
    return [name for name in names if isinstance(bench.network.model.get_submodule(name), nn.Linear)]


def first_reader(bench: Bench, block: Block) -> list[str]:
    """The first layer of a unit: what reaches it does not depend on the unit's own weights."""
    return linear(bench, block.unit.layers[:1])


@pytest.mark.parametrize("budget", [0, 2**30])
def test_the_full_precision_stream_sees_what_the_model_sees(bench: Bench, budget: int) -> None:
    expected = bench.inputs_of(bench.network.model)
    for block in bench.walk("fp", spill_budget=budget):
        names = linear(bench, block.unit.layers)
        found = block.observe(dict.fromkeys(names, Rows.of), "fp")
        for name in names:
            assert same(found[name].seen, expected[name])
            assert same(found[name].original, expected[name])
        store_all(block)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_the_quantized_stream_sees_what_the_finished_model_sees(bench: Bench, budget: int) -> None:
    found: dict[str, Rows] = {}
    for block in bench.walk("quantized", spill_budget=budget):
        found |= block.observe(dict.fromkeys(first_reader(bench, block), Rows.of), "quantized")
        store_all(block)
    finished, full = bench.inputs_of(bench.model), bench.inputs_of(bench.network.model)
    for name, rows in found.items():
        assert same(rows.seen, finished[name])
        assert same(rows.seen, full[name]) == (name in bench.anatomy.layers[:1] or bench.anatomy.units[0].name in name)
    assert len(found) >= 2


def test_both_streams_are_paired_row_by_row(bench: Bench) -> None:
    found: dict[str, Rows] = {}
    for block in bench.walk("both", spill_budget=0):
        found |= block.observe(dict.fromkeys(first_reader(bench, block), Rows.of), "both")
        store_all(block)
    finished, full = bench.inputs_of(bench.model), bench.inputs_of(bench.network.model)
    for name, rows in found.items():
        assert same(rows.seen, finished[name])
        assert same(rows.original, full[name])


def test_the_walk_leaves_forward_methods_hooks_and_batches_as_they_were(bench: Bench) -> None:
    before = [copy.deepcopy(batch) for batch in bench.batches]
    for block in bench.walk("both", spill_budget=0):
        block.observe(dict.fromkeys(block.unit.layers, Rows.of), "both")
        store_all(block)
    for module in bench.model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
    for batch, true in zip(bench.batches, before, strict=True):
        pairs = zip(batch.values(), true.values(), strict=True) if isinstance(batch, dict) else [(batch, true)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_a_finished_unit_was_stored_from_is_freed(bench: Bench) -> None:
    before: list[weakref.ref[Tensor]] = []
    for block in bench.walk("quantized"):
        assert all(held() is None for held in before)
        before = [
            weakref.ref(block.module.get_submodule(block.local(n)).weight) for n in block.unit.layers if block.local(n)
        ]
        store_all(block)


def test_weights_that_a_finished_unit_was_read_from_leave_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [bench.model.get_submodule(unit.name) for unit in bench.anatomy.units]
    expected = [{p.data_ptr() for p in unit.parameters()} for unit in units]
    given: list[set[int]] = []
    monkeypatch.setattr("dither.walk.give_back_mapped", lambda ranges: given.append({first for first, _ in ranges}))
    for block in bench.walk("quantized"):
        assert len(given) == bench.anatomy.units.index(block.unit)
    assert given == expected


@pytest.mark.parametrize("stop_at", [0, 1])
def test_an_error_in_a_method_restores_the_model(bench: Bench, stop_at: int) -> None:
    done: list[str] = []
    blocks = bench.walk("both", spill_budget=0, on_done=lambda block: done.append(block.unit.name))
    with pytest.raises(RuntimeError, match="stop"):
        for number, block in enumerate(blocks):
            if number == stop_at:
                raise RuntimeError("stop")
            store_all(block)
    blocks.close()  # type: ignore[attr-defined]
    assert done == [unit.name for unit in bench.anatomy.units[:stop_at]]
    assert all("forward" not in module.__dict__ for module in bench.model.modules())
    bench.network.logits(bench.batches[0], bench.model)


def test_finished_units_are_handed_on_in_order_and_restored_ones_are_not_visited(bench: Bench) -> None:
    names = [unit.name for unit in bench.anatomy.units]
    done: list[str] = []

    def restore(unit: Unit) -> bool:
        return unit.name == names[1]

    for block in bench.walk("fp", restore=restore, on_done=lambda block: done.append(block.unit.name)):
        assert block.unit.name != names[1]
    assert done == [names[0], *names[2:]]


def test_a_value_that_is_not_finite_is_reported_with_the_layer(odd: Callable[..., Any]) -> None:
    network = odd()
    batch = network.batch(2)
    batch[1, 0, 0] = torch.inf
    bench = Bench(network, [batch])

    def check(seen: Tensor, original: Tensor) -> Rows:
        if not bool(torch.isfinite(seen).all()):
            raise NonFiniteError("activations hold Inf")
        return Rows.of(seen, original)

    block = next(iter(bench.walk("fp")))
    with pytest.raises(NonFiniteError, match="input of stem: activations hold Inf"):
        block.observe({"stem": check})


def test_a_stream_that_was_not_asked_for_is_named(odd: Callable[..., Any]) -> None:
    network = odd()
    block = next(iter(Bench(network, [network.batch(2)]).walk("fp")))
    with pytest.raises(InputError, match="'quantized' inputs were not walked, only fp"):
        block.observe({"stem": Rows.of}, "quantized")


def test_a_statistic_may_keep_what_it_was_given_when_activations_go_to_disk(odd: Callable[..., Any]) -> None:
    from dither.statistics.sample import RowSample

    network = odd()
    bench = Bench(network, [network.batch(3)])
    expected = bench.inputs_of(bench.network.model)
    for block in bench.walk("fp", spill_budget=0):
        found = block.observe({name: lambda seen, _: RowSample.of(seen) for name in block.unit.layers})
        for name, sample in found.items():
            assert torch.equal(sample.rows, expected[name][0].flatten(0, -2))


def test_the_layers_of_a_block_are_grouped_by_what_they_read(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    blocks = iter(Bench(network, [network.batch(2)]).walk("fp"))
    block = next(blocks)
    names = [tuple(name.rpartition(".")[2] for name in group) for group in block.groups()]
    assert names == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def test_something_that_is_no_layer_is_refused(odd: Callable[..., Any]) -> None:
    network = odd()
    blocks = iter(Bench(network, [network.batch(2)]).walk("fp"))
    next(blocks)
    with pytest.raises(TypeError, match=r"blocks\.0\.norm1 is a LayerNorm, not a layer"):
        next(blocks).layer("blocks.0.norm1")


class Summing(nn.Module):
    """A block whose residual sum is written into its input, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.in_place = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(self.norm(x)).relu())
        if self.in_place:
            x += y
            return x
        return x + y


@pytest.mark.parametrize("method", ["gptq", "erq"])
def test_a_block_that_writes_into_its_input_is_quantized_like_one_that_does_not(method: str) -> None:
    found = []
    for in_place in (False, True):
        blocks = nn.Sequential(*(Summing(in_place) for _ in range(3)))
        model = randomize(nn.Sequential(nn.Linear(8, 12), blocks), seed=0)
        batches = [torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        found.append(dither.quantize(model.eval(), method, batches).network.model(batches[0]))
    assert torch.equal(*found)
