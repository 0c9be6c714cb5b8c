"""SmoothQuant on a network with loud channels: one range a token is enough once they are smoothed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dither
from dither.methods import RTN, SmoothQuant

FIELDS: dict[str, Any] = {"weights": "int8:sym:narrow:minmax", "activations": "int4:token:sym:narrow:minmax"}


def loud(network: Any) -> Any:
    """The same function, with a few channels behind norms thirty times as large."""
    with torch.no_grad():
        for layer in network.model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [getattr(layer.self_attn, f"{key}_proj") for key in "qkv"]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[::8] *= 30
                for reader in readers:
                    reader.weight[:, ::8] /= 30
    return network


def change(network: Any, method: dither.Method) -> float:
    result = dither.quantize(network.model, method, [network.batch(16)])
    batch = network.batch(16, seed=9)
    true = network.logits(batch)
    return float((network.logits(batch, result.model) - true).norm() / true.norm())


def test_smoothing_undoes_what_loud_channels_do(tiny: Callable[..., Any]) -> None:
    network = loud(tiny("LlamaForCausalLM", num_hidden_layers=1))
    plain, smooth, none = (
        change(network, method)
        for method in (
            RTN(**FIELDS, probabilities="none"), SmoothQuant(**FIELDS, alpha=0.8), SmoothQuant(**FIELDS, alpha=0.0)
        )
    )  # fmt: skip
    assert smooth < 0.5 * plain  # measured: 0.3
    assert smooth < none


def test_scales_are_shared_by_all_layers_behind_a_norm_and_remarked(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", num_hidden_layers=1)
    result = dither.quantize(network.model, SmoothQuant(), [network.batch(4)])
    remarks = {row["name"]: row["reason"] for row in result.report.data["coverage"]}
    assert remarks["model.layers.0.input_layernorm"] == "smoothed with 3 layers"
    assert remarks["model.layers.0.post_attention_layernorm"] == "smoothed with 2 layers"
    norms = (one.model.layers[0].input_layernorm.weight.detach() for one in (network.model, result.model))
    ratio = next(norms) / next(norms)
    for name in ("q_proj", "k_proj", "v_proj"):
        true = network.model.get_submodule(f"model.layers.0.self_attn.{name}").weight.detach()
        mine = result.model.get_submodule(f"model.layers.0.self_attn.{name}").weight
        assert float((mine - true * ratio).norm() / (true * ratio).norm()) < 0.01


def test_defaults_are_the_papers() -> None:
    method = SmoothQuant()
    assert str(method.weights) == "int8:channel:narrow"
    assert str(method.activations) == "int8:token:narrow"
    assert str(method.attention) == "int8:token:narrow"
    assert method.alpha == 0.5


def test_a_network_without_norms_is_rounded(odd: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert dither.quantize(model, SmoothQuant(), x).report.data["layers"][0]["weight_error"] < 1e-4
