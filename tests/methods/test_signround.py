"""SignRound on tiny language models: its starts, its combination of parts, and that it lowers what it learns from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.errors import InputError
from dither.methods.gptq import GPTQ
from dither.methods.rtn import RTN
from dither.methods.signround import SignRound
from dither.nn.linear import QuantizedLinear


def codes(model: nn.Module) -> dict[str, Tensor]:
    layers = (pair for pair in model.named_modules() if isinstance(pair[1], QuantizedLinear))
    return {name: layer.packed.qtensor().codes for name, layer in layers}


def rows(result: Any) -> list[dict[str, Any]]:
    return list(result.report.data["layers"])


def batches(network: Any) -> list[Any]:
    return [network.batch(4, seed=seed) for seed in range(3)]


def test_without_iterations_it_is_rounding_to_nearest(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    fields: dict[str, Any] = {"weights": "int3:g16:asym:minmax"}
    mine = dither.quantize(network.model, SignRound(iterations=0, **fields), batches(network))
    theirs = dither.quantize(network.model, RTN(**fields), batches(network))
    assert codes(mine.model).keys() == codes(theirs.model).keys()
    assert all(torch.equal(x, codes(theirs.model)[name]) for name, x in codes(mine.model).items())


def test_without_iterations_and_from_columns_it_is_gptq(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", num_hidden_layers=1)
    fields: dict[str, Any] = {"weights": "int3:g16:asym:minmax", "inputs": "quantized"}
    mine = dither.quantize(network.model, SignRound(iterations=0, start="columns", **fields), batches(network))
    theirs = dither.quantize(network.model, GPTQ(**fields), batches(network))
    same = torch.cat([(x == codes(theirs.model)[name]).flatten() for name, x in codes(mine.model).items()])
    assert float(same.float().mean()) > 0.999  # Grams in float64 and of both streams in turn round differently


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": "int2:g16:sym"},
        {"weights": "int2:g16:asym:tight:realzero:s4.16", "start": "groups", "range_by": "output", "rule": "adam"},
        {"weights": "int2:g16:sym", "start": "groups", "range_by": "weight", "rule": "momentum", "norm_rate": 0.1},
        {"weights": "int3", "activations": "int4:token", "probabilities": "none", "weigh": "token"},
        {"weights": "int3:g16", "inputs": "fp"},
        {"weights": "int3:g16", "inputs": "quantized", "start": "columns", "range_gradient": "codes", "widest": 1.5},
    ],
)
def test_the_loss_falls_and_what_is_saved_is_what_was_learned(
    tiny: Callable[..., Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    network = tiny("LlamaForCausalLM")
    method = SignRound(iterations=15, batch_size=3, **({"rate": 0.15} | fields))
    result = dither.quantize(network.model, method, batches(network), output=tmp_path / "out")
    notes = [row["notes"] for row in rows(result)]
    assert all(note["loss_after"] <= note["loss_before"] for note in notes)
    assert any(note["loss_after"] < note["loss_before"] for note in notes)
    again = dither.load(tmp_path / "out")
    assert torch.equal(network.logits(network.batch(2), again), network.logits(network.batch(2), result.model))


def test_norms_are_learned_only_where_asked_and_the_given_model_keeps_its_own(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", num_hidden_layers=1)
    name = "model.layers.0.input_layernorm.weight"
    before = network.model.get_parameter(name).clone()
    for rate, same in ((0.0, True), (0.5, False)):
        method = SignRound(weights="int2:g16", iterations=10, rate=0.2, norm_rate=rate)
        result = dither.quantize(network.model, method, batches(network))
        assert torch.equal(result.model.get_parameter(name), before) == same
        assert torch.equal(network.model.get_parameter(name), before)


def test_it_goes_on_after_an_interruption_to_the_same_bits(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("LlamaForCausalLM")
    method = SignRound(weights="int2:g16", iterations=5, norm_rate=0.1)
    whole = dither.quantize(network.model, method, batches(network), output=tmp_path / "whole")

    def stop(unit: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dither.quantize(network.model, method, batches(network), output=tmp_path / "out", progress=stop)
    rest = dither.quantize(network.model, method, batches(network), output=tmp_path / "out", resume=True)
    for key, x in whole.model.state_dict().items():
        assert torch.equal(x, rest.model.state_dict()[key])


def test_a_block_that_mixes_samples_is_refused(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    block = network.model.blocks[0]
    inner = type(block).forward

    class Mixed(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = inner(self, x)
            return out - out.mean(dim=0)

    block.__class__ = Mixed
    with pytest.raises(InputError, match="mixes the samples of a batch"):
        dither.quantize(network.model, SignRound(iterations=1), [network.batch(4), network.batch(4, seed=1)])
