"""Suspended passes: the same output as an ordinary call, from memory or disk, and nothing left behind."""

import gc
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither.errors import InputError
from dither.models.anatomy import read_anatomy
from dither.models.forward import Stream, layer_inputs, suspended_at
from dither.models.network import Network
from dither.models.spill import Spill, tensors_in


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary files would be, but for what torch makes when it is first asked to compile."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def advance(stream: Stream, model: nn.Module, at_once: bool) -> None:
    """Run every pass over its unit with the unit's own weights, one after the other or all `at_once`."""
    unit = stream.unit
    assert unit is not None
    module = model.get_submodule(unit)
    if at_once:
        stream.resume(stream.outputs(module))
    else:
        stream.advance(module)


def through(network: Any, batches: list[Any], budget: int, streams: int = 1, at_once: bool = False) -> list[list[Any]]:
    run = Network(network.model, "tiny").run
    units = [unit.name for unit in read_anatomy(network.model, lambda: run(batches[0])).units]
    kept = [*network.model.parameters(), *network.model.buffers(), *tensors_in(batches)]
    with torch.no_grad(), Spill(budget, kept) as spill, suspended_at(network.model, units):
        open_streams = [Stream(run, batches, spill) for _ in range(streams)]
        for unit in units:
            for stream in open_streams:
                assert stream.unit == unit
                advance(stream, network.model, at_once)
        assert all(stream.unit is None for stream in open_streams)
        assert (spill.spilled > 0) == (budget == 0)
        assert not spill._parked
    return [stream.results for stream in open_streams]


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize(
    "name",
    [
        "ViTForImageClassification",
        "SwinForImageClassification",
        "BertForSequenceClassification",
        "LlamaForCausalLM",
        "SegformerForImageClassification",
        "ConvNextForImageClassification",
    ],
)
def test_passes_put_out_what_the_model_does(tiny: Callable[..., Any], temporary: Path, name: str, budget: int) -> None:
    network = tiny(name)
    batches = [network.batch(2, seed=1), network.batch(3, seed=2), network.batch(1, seed=3)]
    expected = [network.logits(batch) for batch in batches]
    for results in (*through(network, batches, budget, streams=2), *through(network, batches, budget, at_once=True)):
        for result, true in zip(results, expected, strict=True):
            assert torch.equal(logits(result), true)
    assert list(temporary.iterdir()) == []
    for batch, true in zip(batches, expected, strict=True):
        assert torch.equal(network.logits(batch), true)


def test_batches_that_are_views_of_one_tensor_stay_whole(tiny: Callable[..., Any]) -> None:
    network = tiny()
    pixels = network.batch(5)
    expected = pixels.clone()
    through(network, list(pixels.split(2)), budget=0)
    assert torch.equal(pixels, expected)


def test_a_call_from_elsewhere_runs_as_always_and_forward_is_restored(tiny: Callable[..., Any]) -> None:
    network = tiny()
    expected = network.logits(network.batch(2))
    own = network.model.classifier
    own.forward = own.forward  # as a library that wraps a module does
    with suspended_at(network.model, ["vit.layers.0", "classifier"]):
        assert torch.equal(network.logits(network.batch(2)), expected)
    assert "forward" not in network.model.vit.layers[0].__dict__
    assert "forward" in own.__dict__
    assert torch.equal(network.logits(network.batch(2)), expected)


class Unwound(nn.Module):
    """Notes that its pass was unwound."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unwound = nn.Linear(2, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.fc(x)
        finally:
            self.unwound += 1


def test_closing_unwinds_the_passes_that_wait() -> None:
    model = Unwound()
    with Spill(0) as spill, suspended_at(model, ["fc"]):
        stream = Stream(model, [torch.ones(1, 2), torch.ones(2, 2)], spill)
        assert model.unwound == 0
        stream.close()
        assert model.unwound == 2
        stream.close()


def test_an_error_of_the_model_unwinds_the_passes_that_wait_already() -> None:
    model = Unwound()

    def run(x: Tensor) -> Tensor:
        if x.shape[0] == 2:
            raise RuntimeError("too many")
        return model(x)

    with Spill(0) as spill, suspended_at(model, ["fc"]), pytest.raises(RuntimeError, match="too many") as caught:
        Stream(run, [torch.ones(1, 2), torch.ones(2, 2)], spill)
    assert model.unwound == 1
    del caught
    gc.collect()


def test_batches_that_take_different_ways_are_refused() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"first": first, "second": second})

    def run(x: Tensor) -> Tensor:
        return first(x) if x.shape[0] == 1 else second(x)

    with Spill(0) as spill, suspended_at(model, ["first", "second"]):
        with pytest.raises(InputError, match=r"different ways through the model \(\['first', 'second'\]\)"):
            Stream(run, [torch.ones(1, 2), torch.ones(2, 2)], spill)
        with pytest.raises(InputError, match="different ways"):
            Stream(lambda x: x if x.shape[0] == 1 else second(x), [torch.ones(1, 2), torch.ones(2, 2)], spill)


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "SwinForImageClassification", "BertForSequenceClassification"])
def test_some_samples_of_several_batches_run_as_one_batch_with_gradients(
    tiny: Callable[..., Any], name: str, budget: int, temporary: Path
) -> None:
    network = tiny(name)
    batches = [network.batch(size, seed=size) for size in (3, 2, 4)]
    run = Network(network.model, "tiny").run
    units = [unit.name for unit in read_anatomy(network.model, lambda: run(batches[0])).units]
    kept = [*network.model.parameters(), *network.model.buffers(), *tensors_in(batches)]
    with torch.no_grad(), Spill(budget, kept) as spill, suspended_at(network.model, units):
        stream = Stream(run, batches, spill)
        while stream.unit is not None and not isinstance(network.model.get_submodule(stream.unit), nn.Linear):
            module = network.model.get_submodule(stream.unit)
            outputs = stream.outputs(module)
            with torch.enable_grad():
                some = first(stream.call(module, [0, 2, 4, 8]))
                some.sum().backward()
            assert stream.samples == 9
            torch.testing.assert_close(some, first(stream.pick(outputs, [0, 2, 4, 8])), rtol=1e-4, atol=1e-5)
            stream.resume(outputs)
        stream.close()
    assert any(parameter.grad is not None for parameter in network.model.parameters())


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class Twice(nn.Module):
    """Two layers, of which the first may run twice."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.last, self.twice, self.done = nn.Linear(2, 2), nn.Linear(2, 2), twice, 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x))
        self.done += 1
        return self.first(out) if self.twice else out


@pytest.mark.parametrize("twice", [False, True])
def test_passes_end_at_the_last_input_once_it_is_known_that_no_layer_runs_twice(twice: bool) -> None:
    module = Twice(twice)
    batches = [torch.full((1, 2), float(value)) for value in range(3)]
    with torch.no_grad(), Spill(2**30) as spill, suspended_at(nn.ModuleDict({"block": module}), ["block"]):
        stream = Stream(module, batches, spill)
        forward = module.__dict__.pop("forward")  # as the walk's copies are: a call runs
        layers = {"first": module.first, "last": module.last}
        seen = [{name: list(given) for name, given in one.items()} for one in layer_inputs(stream, module, layers)]
        module.forward = forward
        stream.close()
    assert module.done == (3 if twice else 1)
    for batch, one in zip(batches, seen, strict=True):
        assert torch.equal(one["first"][0], batch)
        assert torch.equal(one["last"][0], module.first(batch))
        assert len(one["first"]) == (2 if twice else 1)


class Summed(nn.Module):
    """A residual sum that writes over what the last layer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x += self.last(x)
        return x


class Doubling(nn.Module):
    """A unit that changes its input in place, before or behind its layer."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.layer, self.early = nn.Linear(2, 2), early

    def forward(self, x: Tensor) -> Tensor:
        if self.early:
            return self.layer(x.mul_(2))
        y = self.layer(x)
        x += y
        return x


class Around(nn.Module):
    """What is behind the unit reads the changed input as well as the output."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.block = Doubling(early)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return torch.cat([self.block(x), x])


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("early", [True, False])
def test_a_unit_that_changes_its_input_sees_the_same_input_each_time(early: bool, budget: int) -> None:
    model = Around(early)
    batches = [torch.full((1, 2), float(value)) for value in range(3)]
    with torch.no_grad(), Spill(budget) as spill, suspended_at(model, ["block"]):
        expected = [model(batch) for batch in batches]
        stream = Stream(model, batches, spill)
        forward = model.block.__dict__.pop("forward")
        for _ in range(2):
            seen = [one["layer"][0].clone() for one in layer_inputs(stream, model.block, {"layer": model.block.layer})]
            for x, batch in zip(seen, batches, strict=True):
                assert torch.equal(x, (batch + 1) * (1 + early))
            assert torch.equal(stream.once(model.block), expected[0][:1])
        stream.outputs(model.block)  # as a method may, before the walk does
        outputs = stream.outputs(model.block)
        assert torch.equal(next(stream.run(model.block)), expected[0][:1])
        if early:  # either way on
            model.block.forward = forward
            stream.resume(outputs)
        else:
            stream.advance(model.block)
            model.block.forward = forward
        assert stream.unit is None
    assert all(torch.equal(*pair) for pair in zip(stream.results, expected, strict=True))


def test_a_unit_that_changes_its_input_for_some_batches_only_is_refused() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if bool(x[0, 0] > 1) else x * 2

    model = nn.ModuleDict({"block": Sometimes()})
    batches = [torch.full((1, 2), float(value)) for value in range(3)]
    with torch.no_grad(), Spill(2**30) as spill, suspended_at(model, ["block"]):
        stream = Stream(lambda x: model["block"](x), batches, spill)
        del model["block"].forward
        with pytest.raises(InputError, match="block changes its input in place for some batches only"):
            stream.outputs(model["block"])
        model["block"].forward = lambda x: x
        stream.close()


def test_an_input_that_is_changed_in_place_is_the_one_that_the_layer_was_given() -> None:
    module = Summed()
    batches = [torch.full((1, 2), float(value)) for value in range(3)]
    with torch.no_grad(), Spill(2**30) as spill, suspended_at(nn.ModuleDict({"block": module}), ["block"]):
        stream = Stream(module, batches, spill)
        forward = module.__dict__.pop("forward")
        layers = {"first": module.first, "last": module.last}
        seen = [{name: list(given) for name, given in one.items()} for one in layer_inputs(stream, module, layers)]
        module.forward = forward
        stream.close()
    for batch, one in zip(batches, seen, strict=True):
        assert torch.equal(one["first"][0], batch)
        assert torch.equal(one["last"][0], module.first(batch))


def test_inputs_are_free_once_their_pass_has_gone_on() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    batches = [torch.full((1, 2), float(value)) for value in range(3)]
    alive: list[int] = []
    with torch.no_grad(), Spill(2**30, batches) as spill, suspended_at(model, ["0", "1"]):
        stream = Stream(model, batches, spill)
        stream.advance(model[0])
        inputs = [weakref.ref(call.args[0]) for call in stream.calls]

        def last(x: Tensor) -> Tensor:
            alive.append(sum(one() is not None for one in inputs))
            return x + 1

        stream.advance(last)
    assert alive == [3, 2, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
def test_no_stream_is_captured_where_cuda_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("a CUDA build without a GPU dies here")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    model = Unwound()
    told: list[bool] = []

    def run(x: Tensor) -> Tensor:
        told.append(torch.cuda.is_current_stream_capturing())
        return model(x)

    with Spill(0) as spill, suspended_at(model, ["fc"]):
        Stream(run, [torch.ones(1, 2)], spill).close()
    assert told == [False]
    assert torch.cuda.is_current_stream_capturing is asked
