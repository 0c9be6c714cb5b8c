"""UDFC: real pruning and rounding without data, absorbed by the next layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dither
from dither.errors import InputError
from dither.export.export import export
from dither.methods.udfc import UDFC, Damage, compress
from dither.models.batchnorm import fold_batch_norms, is_batch_norm
from dither.models.channels import ChannelChain
from dither.nn.linear import QuantizedConv2d
from dither.recipe import parse_method
from dither.solvers.absorption import selection


def settled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if is_batch_norm(module):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 4)  # type: ignore
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)  # type: ignore
    return model


NAMES = ["ResNetForImageClassification", "MobileNetV2ForImageClassification"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_network_is_smaller_and_comes_back_from_its_folder(
    tiny: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    network = tiny(name)
    settled(network.model).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    whole = dither.quantize(tmp_path / "model", UDFC(), network.batch(2))
    method = parse_method("udfc-corrected", {"prune": 0.5})
    result = dither.quantize(tmp_path / "model", method, network.batch(2), output=tmp_path / "out")
    rows = result.report.data["pruning"]["layers"]
    assert rows
    for row in rows:
        layer = result.model.get_submodule(row["name"])
        assert isinstance(layer, QuantizedConv2d)
        assert layer.packed.shape[0] == row["after"] == round(row["before"] / 2)
        for reader in row["readers"]:
            found = result.model.get_submodule(reader)
            assert row["after"] == (found.in_channels if isinstance(found, QuantizedConv2d) else found.in_features)
    sizes = [one.report.data["totals"]["size_bytes"] for one in (result, whole)]
    assert sizes[0] < 0.9 * sizes[1]
    expected = network.logits(network.batch(3), result.model)
    assert torch.equal(network.logits(network.batch(3), dither.load(tmp_path / "out")), expected)
    import transformers

    loaded = getattr(transformers, name).from_pretrained(tmp_path / "out")
    assert torch.equal(network.logits(network.batch(3), loaded), expected)
    assert "Pruned widths" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(InputError, match="channels were pruned"):
        export(tmp_path / "out", "dequantized", tmp_path / "plain")


@pytest.mark.parametrize("name", ["udfc", "udfc-corrected"])
def test_where_nothing_is_pruned_and_rounding_is_fine_the_function_stays(tiny: Callable[..., Any], name: str) -> None:
    network = tiny("ResNetForImageClassification")
    settled(network.model)
    batch = network.batch(4)
    errors = []
    for absorb in ("false", "true"):
        method = parse_method(f"{name}+absorb={absorb}+ridge=0", {"weights": "int8:channel:sym:minmax"})
        result = dither.quantize(network.model, method, batch)
        true = network.logits(batch)
        errors.append(float((network.logits(batch, result.model) - true).norm() / true.norm()))
    assert errors[1] < 0.05
    assert errors[1] < 3 * errors[0]


def test_dead_channels_are_the_ones_to_go_and_cost_nothing(tiny: Callable[..., Any]) -> None:
    network = tiny("ResNetForImageClassification")
    settled(network.model)
    fold_batch_norms(network.model, lambda: network.model(network.batch(2)))
    model = network.model
    source = "resnet.encoder.stages.1.layers.1.layer.0.convolution"
    reader = source.replace("layer.0", "layer.1")
    conv = model.get_submodule(source)
    with torch.no_grad():
        conv.weight[::2] = 0.0
        conv.bias[::2] = -1.0  # behind a ReLU: nothing
    before = network.logits(network.batch(3))
    kept = torch.arange(1, conv.out_channels, 2)
    damage = Damage(kept, selection(kept, conv.out_channels), None, conv.out_channels)
    with torch.no_grad():
        compress(model, ChannelChain(source, (), (reader,)), damage)
    assert model.get_submodule(source).weight.shape[0] == len(kept)
    assert model.get_submodule(reader).weight.shape[1] == len(kept)
    torch.testing.assert_close(network.logits(network.batch(3)), before)


def test_a_chain_with_a_kept_layer_is_left_alone_and_says_why(tiny: Callable[..., Any]) -> None:
    network = tiny("ResNetForImageClassification")
    skipped = "resnet.encoder.stages.0.layers.0.layer.1.convolution"
    result = dither.quantize(network.model, UDFC(prune=0.5, skip=(skipped,)), network.batch(2))
    reasons = {row["name"]: row["reason"] for row in result.report.data["coverage"]}
    source = skipped.replace("layer.1", "layer.0")
    assert f"not pruned: {skipped} stays in full precision" in reasons[source]
    assert source not in [row["name"] for row in result.report.data["pruning"]["layers"]]


def test_the_report_names_chains_that_the_ridge_shrinks(tiny: Callable[..., Any]) -> None:
    network = tiny("MobileNetV2ForImageClassification")
    settled(network.model)
    for method, expected in ((UDFC(ridge=1e3), True), (parse_method("udfc-corrected", {"weights": "int8"}), False)):
        report = dither.quantize(network.model, method, network.batch(2)).report.data
        reasons = [row["reason"] for row in report["coverage"] if "channels are left" in str(row["reason"])]
        assert reasons and all(("udfc-corrected avoids" in reason) == expected for reason in reasons)
