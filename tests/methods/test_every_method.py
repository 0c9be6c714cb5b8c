"""What every method and preset must do, without being asked: a new one is found in the same two dictionaries."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import dither
from dither.errors import InputError, NonFiniteError
from dither.formats.qtensor import quantize
from dither.methods import METHODS, PRESETS, preset
from dither.methods.base import Method
from dither.nn.linear import QuantizedConv2d, QuantizedLinear
from dither.recipe import build_method as full_method
from dither.recipe import from_data, parse_method, read_recipe, resolved, to_yaml
from dither.storage import write_network

NAMES = [*METHODS, *PRESETS]
LOW: dict[str, Any] = {
    "weights": "int4:minmax",
    "activations": "int4:minmax",
}  # searching ranges would cost most of the time

SHORT: dict[str, dict[str, Any]] = {
    "signround": {"iterations": 15},
    "ptq4vit": {"candidates": 12, "rounds": 1},
    "noisyquant": {"candidates": 12, "reaches": 8},
    "repquant": {"iterations": 5, "clip_steps": 10},
}

pytestmark = pytest.mark.parametrize("name", NAMES)


def made(name: str, fields: dict[str, Any]) -> Method:
    """The method with these fields; one that stores no integers gets tables of levels of the same width and cells."""
    kind = preset(name)[0]
    if "int" in METHODS[kind].kinds:
        return build_method(name, fields)

    def table(text: str) -> str:
        head, *tokens = text.split(":")
        cells = [token for token in tokens if token in ("tensor", "channel") or token.startswith("g")]
        return ":".join([head.replace("int", "nuq"), *cells])

    changed = {key: table(text) for key, text in fields.items() if key == "weights"}
    others = {pattern: table(text) for pattern, text in fields.get("overrides", {}).items()}
    return build_method(name, {**fields, **changed, **({"overrides": others} if others else {})})


def build_method(name: str, fields: dict[str, Any]) -> Method:
    """A method that iterates no longer than a test may take."""
    return full_method(name, SHORT.get(preset(name)[0], {}) | fields)


def states(model: nn.Module) -> dict[str, Tensor]:
    return {key: x.clone() for key, x in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(
        one[key].dtype == x.dtype and torch.equal(one[key], x) for key, x in two.items()
    )


def stored(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedConv2d]:
    kinds = QuantizedLinear | QuantizedConv2d
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def agreement(one: nn.Module, two: nn.Module) -> float:
    """The share of equal codes."""
    pairs = zip(stored(one).values(), stored(two).values(), strict=True)
    same = torch.cat([(a.packed.qtensor().codes == b.packed.qtensor().codes).flatten() for a, b in pairs])
    return float(same.float().mean())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        LOW,
        {
            "weights": "int3:g4:sym:mse",
            "activations": "int8:token",
            "probabilities": "none",
            "entry_activations": "int8",
        },
        {"activations": "none", "skip": ["head", "blocks.0.*"], "overrides": {"stem": "int8:tensor", "*.fc1": "int2"}},
    ],
)
def test_a_resolved_recipe_reads_back_as_the_same_method(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    method = build_method(name, fields)
    assert from_data(resolved(method), "here") == method
    (tmp_path / "recipe.yaml").write_text(to_yaml(method))
    assert read_recipe(tmp_path / "recipe.yaml") == method
    assert yaml.safe_load(to_yaml(method)) == resolved(method)
    assert set(resolved(method)) == {"schema", "method", *type(method).model_fields}


def test_an_unknown_field_or_a_value_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"has no field 'weigths'; did you mean 'weights'\?"):
        build_method(name, {"weigths": "int4"})
    with pytest.raises(InputError, match=r"weights: .*unknown token 'chanel'; did you mean 'channel'\?"):
        build_method(name, {"weights": "int4:chanel"})
    with pytest.raises(InputError, match=f"method '{name}', skip"):
        parse_method(f"{name}+skip=3", {})
    with pytest.raises(ValueError, match="frozen"):
        build_method(name, {}).weights = None  # type: ignore[misc, assignment]


def test_two_runs_give_the_same_bytes_and_the_given_model_stays(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    before, method = states(network.model), made(name, LOW)
    torch.manual_seed(1)
    first = dither.quantize(network.model, method, network.batch(6))
    torch.manual_seed(2)
    second = dither.quantize(network.model, method, network.batch(6), spill_budget=0)
    assert equal(states(first.model), states(second.model))
    assert equal(states(network.model), before)
    assert not stored(network.model)
    keep = ("output_error", "weight_error", "nbytes", "notes", "input_range", "clip_range")
    rows = [[{key: row[key] for key in keep} for row in one.report.data["layers"]] for one in (first, second)]
    assert rows[0] == rows[1]


def test_every_layer_is_stored_on_its_grid_with_its_bias_or_without(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    result = dither.quantize(network.model, made(name, LOW), network.batch(6))
    layers = stored(result.model)
    assert set(layers) == {key for key, module in network.model.named_modules() if isinstance(module, nn.Linear)}
    for key, layer in layers.items():
        qtensor = replace(layer.packed.qtensor(), sparse=None, low_rank=None)
        dense = qtensor.dequantize()  # a table of levels may hold one twice, so values are compared, not codes
        assert torch.equal(quantize(dense, qtensor.grid).dequantize(), dense)
        assert bool(torch.isfinite(layer.weight).all())
        assert layer.weight.shape == network.model.get_submodule(key).weight.shape
        folded = key.endswith(("qkv", "fc1"))  # a fold of a norm's shift needs a bias, and so does an input's offset
        folded |= layer.input_quantizer is not None and layer.input_quantizer.offset is not None
        assert folded or (layer.bias is None) == (network.model.get_submodule(key).bias is None)
    report = result.report.data
    assert [row["name"] for row in report["layers"]] == list(layers)
    assert report["totals"]["bits_per_weight"] > 4
    assert all(row["output_error"] is not None and 0 <= row["output_error"] < 0.3 for row in report["layers"])
    assert not [row for row in report["coverage"] if row["reason"] == "not reached by the walk"]


@pytest.mark.parametrize(
    ("width", "heads", "hidden", "inputs", "rows"), [(20, 2, 37, 7, 5), (6, 3, 1, 1, 1), (9, 1, 5, 3, 1)]
)
def test_odd_sizes_and_a_single_row_of_calibration_are_enough(
    odd: Callable[..., Any], name: str, width: int, heads: int, hidden: int, inputs: int, rows: int
) -> None:
    network = odd(width=width, heads=heads, hidden=hidden, inputs=inputs, depth=1)
    method = made(name, {"weights": "int3", "activations": "int4"})
    result = dither.quantize(network.model, method, network.batch(1, size=rows))
    assert bool(torch.isfinite(network.logits(network.batch(4), result.model)).all())


def test_dead_input_channels_do_no_harm(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    with torch.no_grad():
        for block in network.model.blocks:
            block.norm1.weight[3] = block.norm1.bias[3] = 0.0  # type: ignore[union-attr, index]
            block.fc1.weight[5] = block.fc1.bias[5] = 0.0  # gelu(0) = 0  # type: ignore[union-attr, index]
    batch = network.batch(6)
    batch[..., 2] = 0.0
    result = dither.quantize(network.model, made(name, {"weights": "int8:minmax", "activations": "int8:minmax"}), batch)
    for layer in stored(result.model).values():
        assert bool(torch.isfinite(layer.weight).all())
    true, mine = network.logits(batch), network.logits(batch, result.model)
    assert float((true - mine).norm() / true.norm()) < 0.2


def test_batches_are_only_a_way_to_cut_the_data(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    method, data = made(name, LOW), network.batch(7)
    whole = dither.quantize(network.model, method, [data])
    pieces = dither.quantize(network.model, method, list(data.split(3)))
    assert agreement(whole.model, pieces.model) > 0.99
    assert whole.report.data["provenance"]["calibration"]["count"] == 7
    assert pieces.report.data["provenance"]["calibration"]["count"] == 7


def test_eight_bits_come_close_and_more_bits_come_closer(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    batch = network.batch(8, seed=3)
    errors = []
    for bits in (8, 3):
        fields = dict.fromkeys(("weights", "activations"), f"int{bits}:minmax")
        fields["probabilities"] = f"int{bits}:tensor:unsigned:minmax"
        result = dither.quantize(network.model, made(name, fields), network.batch(16))
        true = network.logits(batch)
        errors.append(float((network.logits(batch, result.model) - true).norm() / true.norm()))
    assert errors[0] < 0.05
    assert errors[0] < errors[1]


def test_weights_alone_may_be_quantized(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    result = dither.quantize(network.model, made(name, {"weights": "int6", "activations": "none"}), network.batch(8))
    assert all(layer.input_quantizer is None for layer in stored(result.model).values())
    assert result.report.data["operands"] == []
    assert {row["activations"] for row in result.report.data["layers"]} == {None}
    true = network.logits(network.batch(8))
    assert float((network.logits(network.batch(8), result.model) - true).norm() / true.norm()) < 0.1


def test_dynamic_activations_work(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    fields = {"weights": "int8:minmax", "activations": "int8:token:minmax", "probabilities": "none"}
    result = dither.quantize(network.model, made(name, fields), network.batch(8))
    true = network.logits(network.batch(8))
    assert float((network.logits(network.batch(8), result.model) - true).norm() / true.norm()) < 0.05


def test_layers_can_be_kept_or_get_another_format(odd: Callable[..., Any], name: str) -> None:
    network = odd()
    fields = {**LOW, "skip": ["head", "blocks.1.*"], "overrides": {"*.fc1": "int8:tensor", "blocks.*": "int2"}}
    result = dither.quantize(network.model, made(name, fields), network.batch(6))
    bits = {key: layer.packed.spec.bits for key, layer in stored(result.model).items()}
    assert bits == {"stem": 4, "blocks.0.qkv": 2, "blocks.0.proj": 2, "blocks.0.fc1": 8, "blocks.0.fc2": 2}
    reasons = {row["name"]: row["reason"] for row in result.report.data["coverage"]}
    assert reasons["head"] == "skipped by 'head'"
    assert reasons["blocks.1.qkv"] == "skipped by 'blocks.1.*'"


@pytest.mark.parametrize("fields", [{"skip": ["blocks.0.fcl"]}, {"overrides": {"blocks.0.fcl": "int8"}}])
def test_a_pattern_that_matches_nothing_is_refused(odd: Callable[..., Any], name: str, fields: dict[str, Any]) -> None:
    network = odd(depth=1)
    with pytest.raises(InputError, match=r"'blocks\.0\.fcl' matches no layer; did you mean 'blocks\.0\.fc[12]'\?"):
        dither.quantize(network.model, made(name, fields), network.batch(2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_and_activations_that_are_not_finite_are_named(
    odd: Callable[..., Any], name: str, value: float
) -> None:
    network = odd()
    batch = network.batch(4)
    batch[1, 2, 0] = value
    with pytest.raises(NonFiniteError, match=r"input of stem: activations hold \d+ NaN or Inf"):
        dither.quantize(network.model, made(name, LOW), batch)
    with torch.no_grad():
        network.model.blocks[1].fc2.weight[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.fc2\.weight holds NaN or Inf"):
        dither.quantize(network.model, made(name, LOW), network.batch(2))


def test_a_group_that_does_not_divide_is_refused_by_the_layers_name(odd: Callable[..., Any], name: str) -> None:
    network = odd(depth=1)
    with pytest.raises(InputError, match=r"stem: .*8"):
        dither.quantize(network.model, made(name, {"weights": "int4:g8"}), network.batch(2))


def test_a_plain_module_comes_back_from_its_folder_bit_by_bit(
    odd: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    network = odd(inputs=8, hidden=36, depth=1)
    fields = {"weights": "int3:g4", "activations": "int4", "overrides": {"head": "int1:tensor", "stem": "int8:sym"}}
    result = dither.quantize(network.model, made(name, fields), network.batch(4))
    write_network(result.network, tmp_path / "out")
    again = dither.load(tmp_path / "out", into=odd(seed=9, inputs=8, hidden=36, depth=1).model)
    assert equal(states(again), states(result.model))
    assert torch.equal(network.logits(network.batch(3), again), network.logits(network.batch(3), result.model))
    with pytest.raises(InputError, match="into="):
        dither.load(tmp_path / "out")


def test_a_transformers_model_comes_back_from_its_folder_bit_by_bit(
    tiny: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    network = tiny(num_hidden_layers=1)
    result = dither.quantize(network.model, made(name, LOW), network.batch(4))
    write_network(result.network, tmp_path / "out")
    expected = network.logits(network.batch(3), result.model)
    for again in (dither.load(tmp_path / "out"), AutoModelForImageClassification.from_pretrained(tmp_path / "out")):
        assert torch.equal(network.logits(network.batch(3), again), expected)
        assert equal(states(again), states(result.model))
    assert torch.equal(network.logits(network.batch(3), dither.load(tmp_path / "out", cached=True)), expected)
