"""MRQ on a folder of dither's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import PROCESSOR

import dither
from dither.errors import InputError
from dither.formats.spec import QuantSpec
from dither.nn.activation import ActivationQuantizer
from dither.nn.linear import PackedWeight, QuantizedConv2d, QuantizedLinear
from dither.requantization import Settings, means, per_weight, requantized_weight

Tinies = Callable[..., Any]


@pytest.fixture
def folder(tiny: Tinies, tmp_path: Path) -> Callable[..., Path]:
    """A quantized tiny network as a folder with a processor."""

    def make(name: str = "MobileNetV2ForImageClassification", **choices: Any) -> Path:
        network = tiny(name, **({"image_size": 32, "input": 32} if name.startswith("ViT") else {}))
        network.model.save_pretrained(tmp_path / "fp")
        processor = PROCESSOR | {"size": {"height": 32, "width": 32}}
        (tmp_path / "fp" / "preprocessor_config.json").write_text(json.dumps(processor))
        method = dither.RTN(**{"weights": "int8:channel:asym", "activations": "int8:tensor", **choices})
        dither.quantize(tmp_path / "fp", method, network.batch(4)).save(tmp_path / "source")
        return tmp_path / "source"

    return make


@pytest.mark.parametrize("to", ["int8:channel", "int8:tensor:pow2"])
def test_a_folder_changes_its_scheme_and_opens_again(folder: Callable[..., Path], to: str, tmp_path: Path) -> None:
    report = dither.requantize(folder("ResNetForImageClassification"), to, tmp_path / "out")
    assert report["layers"] == 11 and report["difference"] < 0.3
    model = dither.load(tmp_path / "out")
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedConv2d):
            grid = module.packed.qtensor().grid
            assert grid.scale.numel() == (1 if "tensor" in to else module.packed.shape[0])
            if "pow2" in to:
                assert bool((torch.frexp(grid.scale)[0] == 0.5).all())
        if isinstance(module, ActivationQuantizer):
            assert module.spec.symmetry in ("unsigned", "sym") and float(module.zero_point) in (0.0, 128.0)
    assert json.loads((tmp_path / "out" / "requantization.json").read_text())["to"] == str(QuantSpec.parse(to))


def test_folding_keeps_the_mean_output_of_grouped_layers() -> None:
    """A depthwise convolution whose weights are rounded to four bits, on constant channels."""
    from dither.models.layers import quantized

    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(6, 12, 3, groups=6)
    weight = torch.randn(12, 9, generator=generator).double()
    layer = quantized(conv, requantized_weight(weight, Settings(QuantSpec.parse("int8")), None), conv.bias, None)
    x = torch.randn(6, generator=generator).double()
    expected = torch.nn.functional.conv2d(
        x.reshape(1, 6, 1, 1).expand(1, 6, 3, 3), weight.reshape(12, 1, 3, 3), groups=6
    )
    assert torch.allclose((weight * per_weight(layer, x, 9)).sum(1), expected.flatten())


def test_means_are_those_of_the_quantized_inputs(folder: Callable[..., Path], tiny: Tinies) -> None:
    model = dither.load(folder("ResNetForImageClassification"))
    name = "classifier.1"
    batch = tiny("ResNetForImageClassification").batch(3)
    first, second = means(model, [name], batch)[name]
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(module.quantize_input(args[0])))
    model(pixel_values=batch)
    handle.remove()
    assert torch.allclose(first.float(), seen[0].mean(0)) and torch.allclose(second.float(), seen[0].square().mean(0))


def test_weights_on_the_new_grid_pack_and_stay(tmp_path: Path) -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).double()
    stored = requantized_weight(weight, Settings(QuantSpec.parse("int8:channel:pow2")), torch.ones(1, 8).double())
    assert torch.equal(PackedWeight.of(stored).qtensor().dequantize(), stored.dequantize())
    assert (stored.dequantize().double() - weight).abs().max() < weight.abs().max() / 64


def test_what_has_no_range_is_named(folder: Callable[..., Path], tmp_path: Path) -> None:
    vit = folder("ViTForImageClassification", activations="int8:token", entry_activations="none")
    with pytest.raises(InputError, match=r"input_quantizer: int8:token\S* has no range of a uniform grid"):
        dither.requantize(vit, "int8:tensor", tmp_path / "o")
    with pytest.raises(InputError, match="holds no quantized layer"):
        dither.requantize(tmp_path / "fp", "int8:tensor", tmp_path / "o")
