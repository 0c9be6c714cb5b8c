"""Pictures made from batch-normalization statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dither.errors import InputError
from dither.models.batchnorm import is_batch_norm
from dither.models.distil import Distillation, Distilled, distil

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small ConvNet whose normalizations know the statistics of smooth pictures."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip
    seen = nn.functional.interpolate(torch.randn(32, 3, 8, 8), SIZE[1:], mode="bilinear") + 0.3
    with torch.no_grad():
        for _ in range(60):
            model(seen)
    return model.eval()


def made(network: nn.Module, seed: int = 0, **settings: Any) -> Distilled:
    chosen = Distillation(count=4, **settings)
    return distil(network, network, SIZE, chosen, seed, torch.device("cpu"))


def test_the_loss_falls_and_the_statistics_match_those_of_the_normalizations(network: nn.Module) -> None:
    found = made(network, steps=200)
    assert found.losses[-1] < 0.02 * found.losses[0]
    assert found.pictures.shape == (4, *SIZE)
    noise = made(network, steps=0)
    assert noise.losses == []
    assert noise.gaps == []
    assert all(row["mean"] < 0.1 and row["std"] < 0.1 for row in found.gaps)  # measured: below 0.06
    before = made(network, steps=1, rate=1e-9).gaps
    assert all(row["std"] > 0.5 for row in before)
    for x in found.pictures:
        torch.testing.assert_close(x.mean(dim=(1, 2)), torch.zeros(3), rtol=0, atol=0.15)
        torch.testing.assert_close(x.std(dim=(1, 2)), torch.ones(3), rtol=0, atol=0.15)


def test_statistics_may_be_those_of_the_whole_batch(network: nn.Module) -> None:
    found = made(network, steps=150, statistics="batch", start="unit")
    assert found.losses[-1] < 0.1 * found.losses[0]


def test_the_seed_alone_decides_and_the_network_stays(network: nn.Module) -> None:
    state = {key: x.clone() for key, x in network.state_dict().items()}
    torch.manual_seed(3)
    one = made(network, steps=5)
    torch.manual_seed(4)
    assert torch.equal(one.pictures, made(network, steps=5).pictures)
    assert not torch.equal(one.pictures, made(network, seed=1, steps=5).pictures)
    assert all(torch.equal(x, state[key]) for key, x in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not one.pictures.requires_grad


def test_a_network_without_batch_normalization_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny().model
    assert not any(is_batch_norm(module) for module in model.modules())
    with pytest.raises(InputError, match="no batch normalization"):
        made(model, steps=2)
