"""HQQ on a small network: its zero-points are real, and its weights closer than rounding to the extremes."""

from collections.abc import Callable
from typing import Any

import torch

import dither
from dither.methods import HQQ, RTN


def weight_error(result: dither.Result) -> float:
    return float(sum(row["weight_error"] for row in result.report.data["layers"]))


def test_zero_points_are_real_and_the_weight_error_falls(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", num_hidden_layers=1)
    found = dither.quantize(network.model, HQQ(weights="int3:g16"), [network.batch(4)])
    plain = dither.quantize(network.model, RTN(weights="int3:g16:asym:tight:realzero:minmax"), [network.batch(4)])
    assert weight_error(found) < 0.97 * weight_error(plain)  # measured: 0.94
    layer = found.model.get_submodule("model.layers.0.mlp.up_proj").packed.qtensor()  # type: ignore[union-attr]
    assert str(layer.spec) == "int3:g16:asym:tight:realzero"
    assert not torch.equal(layer.grid.zero_point, layer.grid.zero_point.round())


def test_calibration_data_do_not_change_the_weights(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    one, two = (
        dither.quantize(network.model, HQQ(weights="int3"), network.batch(2, seed=seed)).model for seed in (0, 1)
    )
    states = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_a_symmetric_format_is_rounded_and_says_so(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    result = dither.quantize(network.model, HQQ(weights="int3:sym"), network.batch(2))
    assert {row["notes"]["zero_point"] for row in result.report.data["layers"]} == {"not real in this format"}
