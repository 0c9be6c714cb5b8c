"""Batch normalizations folded into the layers that they read, found without knowing architectures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.export.export import export
from dither.methods import RTN
from dither.models.batchnorm import fold_batch_norms, is_batch_norm
from dither.nn.batchnorm import FoldedNorm


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with other running statistics than 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if is_batch_norm(module):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 4)  # type: ignore
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)  # type: ignore
    return model.eval()


class Acting(nn.BatchNorm2d):
    """A normalization with an activation of its own behind, as timm has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class Odd(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), Acting(6)
        self.two, self.norm2 = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.three, self.norm3 = nn.Conv2d(6, 6, 1), Odd(6)
        self.norm4 = nn.BatchNorm2d(6)
        self.four, self.norm5 = nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.two(self.norm1(self.one(x))))
        inner = self.three(x.relu())
        x = self.norm4(self.norm3(inner).relu() + inner.mean())
        return self.norm5(self.four(x.mean(dim=(2, 3))))


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "MobileNetV2ForImageClassification"])
def test_every_norm_of_a_network_is_folded_and_the_function_stays(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    settled(network.model)
    batch = network.batch(4)
    before = network.logits(batch)
    norms = [key for key, module in network.model.named_modules() if is_batch_norm(module)]
    remarks = fold_batch_norms(network.model, lambda: network.model(batch[:2]))
    assert set(remarks) == set(norms)
    assert all(why.startswith("folded into ") for why in remarks.values())
    after = network.logits(batch)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    assert not [module for module in network.model.modules() if is_batch_norm(module)]


def test_norms_that_act_are_folded_and_those_that_are_read_otherwise_are_kept_with_a_reason() -> None:
    torch.manual_seed(0)
    model = settled(Net())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
    remarks = fold_batch_norms(model, lambda: model(x))
    assert remarks == {
        "norm1": "folded into one",
        "norm2": "folded into two",
        "norm3": "not folded: something besides it reads the output of three",
        "norm4": "not folded: it does not read the output of a layer directly",
        "norm5": "folded into four",
    }
    assert isinstance(model.norm1, FoldedNorm)
    assert model.norm2.layer == "two"
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_a_norm_that_does_more_than_normalize_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), Odd(4)))
    state = {key: x.clone() for key, x in model[2:].state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        remarks = fold_batch_norms(model, lambda: model(x))
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert remarks == {"1": "folded into 0", "3": "not folded: it does more than normalize"}
    assert all(torch.equal(x, state[key]) for key, x in model[2:].state_dict().items())


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "MobileNetV2ForImageClassification"])
def test_a_folded_network_comes_back_from_its_folder(tiny: Callable[..., Any], name: str, tmp_path: Path) -> None:
    network = tiny(name)
    settled(network.model)
    network.model.save_pretrained(tmp_path / "model")
    layers = [key for key, module in network.model.named_modules() if isinstance(module, nn.Conv2d)]
    method = RTN(weights="int8:minmax", activations="int8:minmax", skip=tuple(layers[2:4]))  # type: ignore[arg-type]
    result = dither.quantize(tmp_path / "model", method, network.batch(4), output=tmp_path / "out")
    expected = network.logits(network.batch(3), result.model)
    assert torch.equal(network.logits(network.batch(3), dither.load(tmp_path / "out")), expected)
    import transformers

    loaded = getattr(transformers, name).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(network.logits(network.batch(3), loaded), expected)
    rows = {row["name"]: row for row in result.report.data["coverage"]}
    assert {row["status"] for row in rows.values()} == {"quantized", "kept", "folded"}
    export(tmp_path / "out", "dequantized", tmp_path / "plain", dtype="float32")
    plain = getattr(transformers, name).from_pretrained(tmp_path / "plain")
    weights_only = dither.quantize(
        tmp_path / "model", method.model_copy(update={"activations": None}), network.batch(4)
    )
    expected = network.logits(network.batch(3), weights_only.model)
    torch.testing.assert_close(network.logits(network.batch(3), plain), expected, rtol=1e-4, atol=1e-4)


def test_folding_can_be_left_out(tiny: Callable[..., Any]) -> None:
    network = tiny("ResNetForImageClassification")
    method = RTN(weights="int8", fold_norms=False)  # type: ignore[arg-type]
    result = dither.quantize(network.model, method, network.batch(2))
    assert [module for module in result.model.modules() if is_batch_norm(module)]
