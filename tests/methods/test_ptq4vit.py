"""PTQ4ViT: twins where they belong, a search that pays, gradients only where they are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
from dither.errors import InputError
from dither.methods.ptq4vit import PTQ4ViT
from dither.methods.rtn import RTN
from dither.recipe import parse_method

FAST: dict[str, Any] = {"candidates": 20, "rounds": 1, "rows": 64}


def rows(result: dither.Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result.report.data["layers"]}


def test_twins_are_behind_gelu_and_softmax_only(tiny: Callable[..., Any]) -> None:
    network = tiny(num_hidden_layers=1)
    result = dither.quantize(network.model, PTQ4ViT(weights="int6", activations="int6", **FAST), network.batch(6))
    layers = {name.rpartition(".")[2]: row["activations"] for name, row in rows(result).items() if row["activations"]}
    assert layers["fc2"] == "twin6:tensor"
    assert {layers[name] for name in ("q_proj", "k_proj", "v_proj", "fc1", "classifier")} == {"int6:tensor:mse"}
    operands = {row["operand"]: row["activations"] for row in result.report.data["operands"]}
    assert operands["probabilities"].startswith("twin6") and operands["query"] == "int6:tensor:mse"
    plain = PTQ4ViT(weights="int6", activations="int6", twin=False, **FAST)
    result = dither.quantize(network.model, plain, network.batch(6))
    formats = [row["activations"] for row in (*rows(result).values(), *result.report.data["operands"])]
    assert not [text for text in formats if text and "twin" in text]


@pytest.mark.parametrize("settings", [{}, {"metric": "squared"}, {"metric": "cosine"}])
def test_searched_ranges_are_better_than_extremes(tiny: Callable[..., Any], settings: dict[str, Any]) -> None:
    network = tiny()
    fields = {"weights": "int4:channel:sym:minmax", "activations": "int4:tensor:sym:minmax", "probabilities": "none"}
    batch, test = network.batch(8), network.batch(16, seed=1)
    true = network.logits(test)
    errors = [
        float((network.logits(test, dither.quantize(network.model, method, batch).model) - true).norm())
        for method in (PTQ4ViT(twin=False, **fields, **FAST, **settings), RTN(**fields))
    ]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("gradients", ["drawn", "label", "divergence"])
def test_each_loss_gives_finite_ranges_and_its_own(tiny: Callable[..., Any], gradients: str) -> None:
    network = tiny(num_hidden_layers=1)
    method = PTQ4ViT(weights="int4", activations="int4", gradients=gradients, **FAST)  # type: ignore[arg-type]
    result = dither.quantize(network.model, method, network.batch(6))
    true = network.logits(network.batch(6))
    assert float((network.logits(network.batch(6), result.model) - true).norm() / true.norm()) < 0.8
    other = dither.quantize(network.model, method.model_copy(update={"metric": "squared"}), network.batch(6))
    assert [row["clip_range"] for row in rows(result).values()] != [row["clip_range"] for row in rows(other).values()]


def test_only_the_hessian_needs_all_weights_in_memory(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny(num_hidden_layers=1)
    network.model.save_pretrained(tmp_path / "model")
    fields = {"weights": "int6", "activations": "int6", **FAST}
    with pytest.raises(InputError, match="read block by block"):
        dither.quantize(tmp_path / "model", PTQ4ViT(**fields), network.batch(2), output=tmp_path / "a", stream=True)
    method = PTQ4ViT(metric="squared", **fields)
    streamed = dither.quantize(tmp_path / "model", method, network.batch(2), output=tmp_path / "b", stream=True)
    whole = dither.quantize(network.model, method, network.batch(2))
    weights = [dict(one.network.tensors()) for one in (streamed, whole)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_grouped_convolutions_are_rounded_to_nearest_and_it_is_said(tiny: Callable[..., Any]) -> None:
    network = tiny("ConvNextForImageClassification")
    result = dither.quantize(network.model, PTQ4ViT(weights="int6", activations="int6", **FAST), network.batch(2))
    notes = {name: row["notes"] for name, row in rows(result).items()}
    assert {name for name, note in notes.items() if note} == {name for name in notes if name.endswith("dwconv")}
    assert {note["ranges"] for note in notes.values() if note} == {"not searched: grouped convolution"}


def test_the_preset_is_the_papers_baseline() -> None:
    method = parse_method("base-ptq", {"weights": "int6", "activations": "int6"})
    assert isinstance(method, PTQ4ViT) and not method.takes_gradients
    assert str(method.probabilities).startswith("int6:tensor:unsigned")
    assert (method.rounds, method.lowest, method.metric) == (1, 0.5, "cosine")
