"""RepQ-ViT: what reparameterization is for, shown on a network whose norm channels have unlike sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dither

FIELDS: dict[str, Any] = {"weights": "int8", "activations": "int4", "attention": "none", "probabilities": "none"}


def rescale(model: nn.Module, spread: float) -> None:
    """Multiply each norm's channels by log-normal factors and divide the weights behind by them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.vit.layers:  # type: ignore[union-attr]
            attention = layer.attention
            for norm, readers in (
                (layer.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.layernorm_after, (layer.mlp.fc1,)),
            ):
                factor = torch.exp(spread * torch.randn(norm.weight.shape, generator=generator))
                norm.weight.mul_(factor)
                norm.bias.mul_(factor)
                for reader in readers:
                    reader.weight.div_(factor)


def errors(result: dither.Result) -> float:
    """Mean output error of the layers behind norms."""
    rows = [row for row in result.report.data["layers"] if row["name"].endswith(("q_proj", "k_proj", "v_proj", "fc1"))]
    return float(sum(row["output_error"] for row in rows) / len(rows))


def test_unlike_channels_ruin_one_range_a_tensor_but_not_reparameterized_ones(tiny: Callable[..., Any]) -> None:
    network = tiny()
    batch = network.batch(8)
    before = network.logits(batch)
    found = {}
    for spread in (0.0, 2.0):
        rescale(network.model, spread)
        found[spread] = {
            name: errors(dither.quantize(network.model, dither.METHODS[name](**FIELDS), batch))
            for name in ("rtn", "repq")
        }
    torch.testing.assert_close(network.logits(batch), before, rtol=1e-3, atol=1e-4)  # the network computes the same
    assert found[2.0]["rtn"] > 10 * found[0.0]["rtn"]  # measured: 0.014 becomes 0.94
    assert found[2.0]["repq"] < 2 * found[0.0]["repq"]
    assert found[2.0]["repq"] < 0.1 * found[2.0]["rtn"]


@pytest.mark.parametrize("round_zero_point", [True, False])
def test_zero_points_are_whole_numbers_unless_the_released_behaviour_is_asked_for(
    tiny: Callable[..., Any], round_zero_point: bool
) -> None:
    network = tiny(num_hidden_layers=1)
    method = dither.RepQ(weights="int4", activations="int4", round_zero_point=round_zero_point)
    model = dither.quantize(network.model, method, network.batch(4)).model
    zero = model.get_submodule("vit.layers.0.attention.q_proj").input_quantizer.zero_point  # type: ignore[union-attr]
    assert (float(zero) == round(float(zero))) == round_zero_point


def test_probabilities_get_logarithmic_codes(tiny: Callable[..., Any]) -> None:
    network = tiny(num_hidden_layers=1)
    result = dither.quantize(network.model, dither.RepQ(weights="int4", activations="int4"), network.batch(4))
    formats = {row["operand"]: row["activations"] for row in result.report.data["operands"]}
    assert formats["probabilities"].startswith("logsqrt2-4")
    assert formats["query"].startswith("int4:tensor:asym")
