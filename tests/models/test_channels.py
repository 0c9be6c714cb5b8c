"""Chains of layers whose channels pass one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither.models.batchnorm import fold_batch_norms
from dither.models.channels import ChannelChain, expected_inputs, find_channel_chains


def chains(model: nn.Module, x: Tensor) -> tuple[list[ChannelChain], dict[str, str]]:
    with torch.no_grad():
        return find_channel_chains(model, lambda: model(x), lambda: model(x.roll(1, dims=-1) * 0.7 + 0.1))


class Net(nn.Module):
    """A plain chain, one through a depthwise layer, a residual stream, a gate, a second reader, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.expand = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1)
        self.depthwise, self.project = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
        self.tied, self.gated, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 10, 1), nn.Linear(10, 10)
        self.after = nn.Conv2d(10, 6, 1)
        self.twice, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.plain(x))
        stream = self.project(nn.functional.silu(self.depthwise(nn.functional.relu(self.expand(x)))))
        stream = stream + self.tied(stream.relu())
        gated = self.gated(stream)
        gated = gated * self.gate(gated.mean(dim=(2, 3))).sigmoid()[:, :, None, None]
        x = self.after(gated).relu()
        both = self.twice(x)
        x = self.last(both.relu()) + both.square().sum()
        return self.head(nn.functional.max_pool2d(x, 2).mean(dim=(2, 3)))


def test_chains_are_those_whose_channels_nobody_else_reads_or_writes() -> None:
    torch.manual_seed(0)
    found, refused = chains(Net().eval(), torch.randn(2, 3, 10, 10))
    assert found == [
        ChannelChain("plain", (), ("expand",)),
        ChannelChain("expand", ("depthwise",), ("project",)),
        ChannelChain("after", (), ("twice",)),
    ]
    assert refused["project"].startswith("not pruned: something besides it writes") or "reads" in refused["project"]
    assert refused["gated"] == "not pruned: something besides gate reads its output"
    assert "besides last reads its output" in refused["twice"]
    assert set(refused) == {"project", "tied", "gated", "twice", "last"}


def test_of_a_residual_network_only_the_first_layer_of_each_block_starts_a_chain(tiny: Callable[..., Any]) -> None:
    network = tiny("ResNetForImageClassification")
    batch = network.batch(2)
    found, refused = chains(network.model, batch)
    assert not found  # their normalizations would have to be cut too
    norm = "resnet.encoder.stages.0.layers.0.layer.0.normalization (BatchNorm2d)"
    first = refused["resnet.encoder.stages.0.layers.0.layer.0.convolution"]
    assert first == f"not pruned: {norm} holds a value for each of its channels"
    fold_batch_norms(network.model, lambda: network.model(batch))
    found, _ = chains(network.model, batch)
    block = "resnet.encoder.stages.{}.layers.{}.layer.{}.convolution"
    expected = [(s, k) for s in range(2) for k in range(2)]
    assert found == [ChannelChain(block.format(s, k, 0), (), (block.format(s, k, 1),)) for s, k in expected]


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU6(inplace=True), nn.Sequential(nn.ReLU6(), nn.AvgPool2d(2)), nn.SiLU()]
)
def test_the_mean_that_a_reader_sees_is_that_of_the_activation_of_a_normal_variable(act: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), act, nn.Conv2d(6, 4, 1)).eval()
    mean, deviation = torch.randn(6), torch.rand(6) + 0.5
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found = expected_inputs(model, lambda n: model(x[:1].expand(n, -1, -1, -1)), "0", "2", mean, deviation)
        z = mean + deviation * torch.randn(200_000, 6)
        inner = act[0] if isinstance(act, nn.Sequential) else act
        torch.testing.assert_close(found, inner(z).mean(dim=0), rtol=0.02, atol=0.01)
    if isinstance(act, nn.ReLU):  # closed form
        ratio = mean / deviation
        density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
        exact = deviation * density + mean * 0.5 * (1 + torch.erf(ratio / 2**0.5))
        torch.testing.assert_close(found, exact, rtol=0.01, atol=0.005)


def test_chains_are_the_same_when_normalizations_are_folded(tiny: Callable[..., Any]) -> None:
    network = tiny("MobileNetV2ForImageClassification")
    batch = network.batch(2)
    fold_batch_norms(network.model, lambda: network.model(batch))
    found, _ = chains(network.model, batch)
    assert sum(bool(one.through) for one in found) >= 16
    assert not [one for one in found if any("conv_3x3" in reader for reader in one.readers)]


def test_an_activation_in_place_hides_no_chain() -> None:
    torch.manual_seed(0)
    act = nn.Hardswish(inplace=True)  # twice is not once
    model = nn.Sequential(nn.Conv2d(3, 6, 3), act, nn.Conv2d(6, 4, 1), act, nn.Conv2d(4, 2, 1)).eval()
    found, _ = chains(model, torch.randn(2, 3, 8, 8))
    assert found == [ChannelChain("0", (), ("2",)), ChannelChain("2", (), ("4",))]
