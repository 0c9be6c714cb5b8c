"""quantize from end to end: every architecture, precision and form of calibration; what is refused before any work."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
from dither.errors import DitherError, InputError, NonFiniteError, SpecError
from dither.nn.linear import QuantizedConv2d, QuantizedLinear
from dither.storage import write_network

ARCHITECTURES = {
    "DeiTForImageClassification": 14,
    "SwinForImageClassification": 27,
    "BertForSequenceClassification": 14,
    "LlamaForCausalLM": 14,
    "AlbertForSequenceClassification": 3,
    "SegformerForImageClassification": 18,
    "ConvNextForImageClassification": 12,
    "ResNetForImageClassification": 11,
    "MobileNetV2ForImageClassification": 53,
}
WITH_ERQ = ["BertForSequenceClassification", "LlamaForCausalLM", "ConvNextForImageClassification"]
WITH_ERQ += ["ResNetForImageClassification"]
HIGH: dict[str, Any] = {"weights": "int8", "activations": "int8", "probabilities": "int8:tensor:unsigned"}


def quantized(model: Any) -> list[str]:
    kinds = QuantizedLinear | QuantizedConv2d
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def distance(network: Any, model: Any, batch: Any) -> float:
    true = network.logits(batch)
    return float((network.logits(batch, model) - true).norm() / true.norm())


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "rtn") for name in ARCHITECTURES), *((name, "erq") for name in WITH_ERQ)]
)
def test_every_architecture_is_quantized_saved_and_loaded(
    tiny: Callable[..., Any], tmp_path: Path, name: str, method: str
) -> None:
    network = tiny(name)
    batches = [network.batch(3, seed=1), network.batch(2, seed=2)]
    result = dither.quantize(network.model, dither.METHODS[method](**HIGH), batches)
    assert len(quantized(result.model)) == ARCHITECTURES[name]
    assert not [row for row in result.report.data["coverage"] if row["reason"] == "not reached by the walk"]
    assert distance(network, result.model, batches[0]) < 0.1
    write_network(result.network, tmp_path / "out")
    again = dither.load(tmp_path / "out")
    assert torch.equal(network.logits(batches[1], again), network.logits(batches[1], result.model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attention_implementations_give_the_same_result(tiny: Callable[..., Any], attention: str) -> None:
    network = tiny(attention=attention, num_hidden_layers=1)
    method = dither.RTN(weights="int4", activations="int4")
    result = dither.quantize(network.model, method, network.batch(4))
    rows = {row["operand"]: row["error"] for row in result.report.data["operands"]}
    assert set(rows) == {"query", "key", "probabilities", "value"}
    other = tiny(attention="eager" if attention == "sdpa" else "sdpa", num_hidden_layers=1)
    twin = dither.quantize(other.model, method, network.batch(4))
    torch.testing.assert_close(
        network.logits(network.batch(3), result.model),
        network.logits(network.batch(3), twin.model),
        rtol=1e-2,
        atol=1e-2,
    )


def test_a_tied_output_layer_asked_for_by_name_is_quantized_and_its_table_kept(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    network = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    result = dither.quantize(
        network.model, dither.RTN(**HIGH, overrides={"lm_head": HIGH["weights"]}), [network.batch(3)]
    )
    assert "lm_head" in quantized(result.model)
    assert torch.equal(result.model.model.embed_tokens.weight, network.model.model.embed_tokens.weight)
    write_network(result.network, tmp_path / "out")
    again = dither.load(tmp_path / "out")
    assert torch.equal(network.logits(network.batch(2), again), network.logits(network.batch(2), result.model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_in_another_precision_stays_in_it(odd: Callable[..., Any], dtype: torch.dtype) -> None:
    network = odd(depth=1)
    network.model.to(dtype)
    batch = network.batch(4).to(dtype)
    for method in (dither.ERQ(**HIGH), dither.GPTQ(**HIGH, reparameterize=True)):
        result = dither.quantize(network.model, method, batch)
        assert network.logits(batch, result.model).dtype == dtype
        assert distance(network, result.model, batch) < 0.1


def test_batches_may_be_tensors_tuples_or_dicts_of_any_size(tiny: Callable[..., Any], odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    data = network.batch(5)
    one = dither.quantize(network.model, "rtn", data, batch_size=2)
    two = dither.quantize(network.model, "rtn", [(data[:2],), (data[2:4],), (data[4:],)])
    three = dither.quantize(network.model, "rtn", [{"x": data[:2]}, {"x": data[2:]}])
    states = [result.model.state_dict() for result in (one, two, three)]
    for key, x in states[0].items():
        assert torch.equal(x, states[1][key])
        assert torch.equal(x, states[2][key])
    assert one.report.data["provenance"]["calibration"]["count"] == 5
    texts = tiny("BertForSequenceClassification")
    dither.quantize(texts.model, "rtn", [texts.batch(1), texts.batch(3)])


def test_the_report_counts_what_is_there(odd: Callable[..., Any]) -> None:
    network = odd()
    data = dither.quantize(network.model, dither.RTN(weights="int4", activations="int4"), network.batch(2)).report.data
    weights = sum(row["shape"][0] * row["shape"][1] for row in data["layers"])
    assert data["totals"]["quantized_parameters"] == weights
    assert data["totals"]["parameters"] == sum(p.numel() for p in network.model.parameters())
    assert data["totals"]["bits_per_weight"] == pytest.approx(
        8 * sum(row["nbytes"] for row in data["layers"]) / weights
    )
    assert data["totals"]["size_bytes"] < data["totals"]["original_bytes"] / 2
    assert data["model"] == {
        "name": "Mlp", "class": "Mlp", "parameters": data["totals"]["parameters"], "source": "Mlp"
    }  # fmt: skip
    assert data["evaluation"] is None


def test_progress_counts_units(odd: Callable[..., Any]) -> None:
    calls: list[tuple[str, int, int]] = []
    network = odd(depth=1)
    dither.quantize(network.model, "rtn", network.batch(2), progress=lambda *call: calls.append(call))
    assert calls == [("stem", 1, 3), ("blocks.0", 2, 3), ("head", 3, 3)]


def test_an_error_inside_a_method_leaves_the_given_model_usable(odd: Callable[..., Any]) -> None:
    class Broken(dither.Method):
        name = "broken"

        def run(self, blocks: Any, engine: Any) -> None:
            next(iter(blocks))
            raise ZeroDivisionError

    network = odd()
    before = network.logits(network.batch(2))
    with pytest.raises(ZeroDivisionError):
        dither.quantize(network.model, Broken(), network.batch(2))
    assert torch.equal(network.logits(network.batch(2)), before)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"weights": "int4:g3"}, InputError),
        ({"weights": "log2-4"}, SpecError),
        ({"weights": "int4:token"}, SpecError),
        ({"activations": "int4:channel"}, SpecError),
        ({"activations": "int4:g4"}, SpecError),
        ({"skip": ["nothing"]}, InputError),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    odd: Callable[..., Any], tmp_path: Path, fields: dict[str, Any], error: type[DitherError]
) -> None:
    network = odd(depth=1)
    with pytest.raises(error):
        dither.quantize(network.model, dither.RTN(**fields), network.batch(2), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_the_model_cannot_take_are_refused(odd: Callable[..., Any], tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="fails on the first calibration batch"):
        dither.quantize(odd().model, "rtn", torch.ones(2, 6, 5))
    with pytest.raises(InputError, match="fails on the first calibration batch"):
        dither.quantize(tiny().model, "rtn", torch.ones(2, 1, 16, 16))
    with pytest.raises(InputError, match="calibration needs"):
        dither.quantize(odd().model, "rtn", [])
    with pytest.raises(InputError, match="there are only 2"):
        dither.quantize(odd().model, "rtn", torch.ones(2, 6, 7), count=3)
    with pytest.raises(NonFiniteError, match="blocks"):
        model = copy.deepcopy(odd().model)
        with torch.no_grad():
            model.blocks[0].norm1.weight[0] = torch.nan
        dither.quantize(model, "rtn", torch.ones(2, 6, 7))


@pytest.mark.slow
def test_worker_processes_change_nothing(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    method = dither.ERQ(weights="int3", activations="int4")
    one, two = (dither.quantize(network.model, method, network.batch(4), workers=n).model.state_dict() for n in (1, 2))
    assert all(torch.equal(x, two[key]) for key, x in one.items())


def test_layers_can_be_all_kept(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    result = dither.quantize(network.model, dither.RTN(skip=["*"]), network.batch(2))
    assert quantized(result.model) == []
    assert torch.equal(network.logits(network.batch(2), result.model), network.logits(network.batch(2)))


def test_token_ranges_are_refused_for_a_convolution_before_anything_runs() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(SpecError, match="2: a convolution has no tokens; write int8:tensor"):
        dither.quantize(model, dither.RTN(activations="int8:token"), torch.randn(2, 3, 8, 8))


def test_probabilities_follow_the_activations_in_log_codes_below_six_bits() -> None:
    assert str(dither.ERQ(activations="int4").probabilities) == "logsqrt2-4:tensor:unsigned:percentile"
    assert str(dither.ERQ(activations="int8").probabilities) == "int8:tensor:unsigned:percentile"
