"""NoisyQuant: the folded bias is exact, noise is stored and counted, and it lowers the errors of its base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.errors import InputError, SpecError
from dither.methods.noisyquant import NoisyQuant
from dither.nn.activation import ActivationQuantizer
from dither.nn.linear import QuantizedConv2d, QuantizedLinear
from dither.solvers.noise_search import Noise
from dither.statistics.output_rows import OutputRows

FAST: dict[str, Any] = {"weights": "int8", "activations": "int4", "candidates": 20, "reaches": 20, "rows": 64}


def noisy(model: nn.Module) -> dict[str, QuantizedLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {
        name: one
        for name, one in layers.items()
        if one.input_quantizer is not None and one.input_quantizer.offset is not None
    }


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer takes noise, whether it helps or not."""

    def search(rows: OutputRows, spec: Any, scales: Any, stored: Any, target: Any, direction: Tensor, *_: Any) -> Noise:
        return Noise(direction * 0.1, 0.1, 1.0, 1.0)

    monkeypatch.setattr("dither.methods.noisyquant.search_noise", search)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("base", ["linear", "ptq4vit"])
def test_the_folded_forward_equals_the_unfolded_one(tiny: Callable[..., Any], base: str) -> None:
    network = tiny(num_hidden_layers=1)
    model = dither.quantize(network.model, NoisyQuant(base=base, **FAST), network.batch(8)).model.double()
    assert len(noisy(model)) == 7
    for name, layer in noisy(model).items():
        quantizer, original = layer.input_quantizer, network.model.get_submodule(name)
        assert quantizer is not None and quantizer.offset is not None
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = quantizer.offset.double()
        plain = ActivationQuantizer(quantizer.spec).set(quantizer.scales)
        unfolded = functional.linear(plain(x + noise) - noise, layer.weight, original.bias.double())  # type: ignore[union-attr, operator]
        torch.testing.assert_close(layer(x), unfolded, rtol=0, atol=1e-6)  # the bias is stored in float32


@pytest.mark.usefixtures("everywhere")
def test_noise_is_loaded_and_counted(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny(num_hidden_layers=1)
    network.model.save_pretrained(tmp_path / "model")
    result = dither.quantize(tmp_path / "model", NoisyQuant(**FAST), network.batch(8), output=tmp_path / "out")
    plain = dither.quantize(network.model, NoisyQuant(noise="none", **FAST), network.batch(8))
    again = dither.load(tmp_path / "out")
    assert list(noisy(again)) == list(noisy(result.model))
    for name, layer in noisy(again).items():
        assert torch.equal(layer.input_quantizer.offset, noisy(result.model)[name].input_quantizer.offset)  # type: ignore[union-attr, arg-type]
    assert not noisy(plain.model)
    pairs = zip(result.report.data["layers"], plain.report.data["layers"], strict=True)
    for mine, theirs in pairs:
        extra = 2 * mine["shape"][1] if mine["name"] in noisy(again) else 0  # float16
        assert mine["nbytes"] == theirs["nbytes"] + extra
        assert mine["bits_per_weight"] == pytest.approx(8 * mine["nbytes"] / (mine["shape"][0] * mine["shape"][1]))
    with pytest.raises(SpecError, match=r"vit\..*: dequantized cannot hold the vector that is added to its input"):
        dither.export(tmp_path / "out", "dequantized", tmp_path / "plain")


@pytest.mark.parametrize("noise", ["search", "condition"])
def test_noise_lowers_the_mean_error_of_its_base(tiny: Callable[..., Any], noise: str) -> None:
    network = tiny()
    batch = network.batch(32)
    errors, reaches = {}, list[float]()
    for kind in ("none", noise):
        result = dither.quantize(network.model, NoisyQuant(noise=kind, inputs="fp", **FAST), batch)  # type: ignore[arg-type]
        layers = [row for row in result.report.data["layers"] if row["kind"] == "Linear"]
        errors[kind] = sum(row["output_error"] for row in layers) / len(layers)
        reaches = [row["notes"].get("noise_reach", 0.0) for row in layers]
    assert max(reaches) > 0
    if noise == "search":
        assert errors[noise] < errors["none"]
    else:
        assert errors[noise] < 1.1 * errors["none"]  # a statement on the mean over all noise, not on one vector


def test_an_error_that_noise_cannot_lower_gets_none() -> None:
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    codes = torch.randint(-7, 8, (64, 8), generator=torch.Generator().manual_seed(0)).float()
    codes[0, 0] = -8.0
    codes[1, 0] = 7.0
    fields: dict[str, Any] = {"weights": "int8", "entry_activations": "int4:tensor:asym"}
    result = dither.quantize(model, NoisyQuant(**fields), codes)
    assert not noisy(result.model)
    assert result.report.data["layers"][0]["notes"]["noise_reach"] == 0


@pytest.mark.usefixtures("everywhere")
def test_convolutions_have_no_noise(tiny: Callable[..., Any]) -> None:
    network = tiny("ConvNextForImageClassification")
    model = dither.quantize(network.model, NoisyQuant(entry_activations="int8", **FAST), network.batch(4)).model
    convolutions = [module for module in model.modules() if isinstance(module, QuantizedConv2d)]
    assert all(one.input_quantizer is not None and one.input_quantizer.offset is None for one in convolutions)
    assert noisy(model)
    with pytest.raises(SpecError, match="convolution takes no offset"):
        one = convolutions[0]
        assert one.input_quantizer is not None
        QuantizedConv2d(one.packed, None, one.input_quantizer.add(torch.zeros(3)), torch.float32, one.geometry)


def test_only_ptq4vits_ranges_need_gradients() -> None:
    assert not NoisyQuant().takes_gradients
    assert NoisyQuant(base="ptq4vit").takes_gradients
    assert str(NoisyQuant(base="ptq4vit", activations="int6").probabilities).startswith("twin6")
    with pytest.raises(InputError, match="noise"):
        dither.recipe.build_method("noisyquant", {"noise": "loud"})  # type: ignore[attr-defined]


@pytest.mark.usefixtures("everywhere")
def test_the_stored_noise_is_the_same_in_every_run_and_differs_between_layers(tiny: Callable[..., Any]) -> None:
    network = tiny(num_hidden_layers=1)
    found: list[dict[str, Tensor]] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = dither.quantize(network.model, NoisyQuant(**FAST), network.batch(8)).model
        found.append({name: one.input_quantizer.offset for name, one in noisy(model).items()})  # type: ignore[union-attr, misc]
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    alike = [x / x.abs().amax() for x in found[0].values() if len(x) == 32]
    assert len(alike) > 2 and not torch.allclose(alike[0], alike[1], atol=0.1)
