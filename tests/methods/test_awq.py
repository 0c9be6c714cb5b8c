"""AWQ on a small network with a few loud channels: scales keep the function and lower the error of the output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dither
from dither.methods import AWQ, RTN

WEIGHTS = "int3:g16"


@pytest.fixture
def loud(tiny: Callable[..., Any]) -> Any:
    """A Llama whose norms put out some channels twenty times as large, as language models do."""
    network = tiny("LlamaForCausalLM", num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            if "layernorm" in name:
                parameter[::8] *= 20
    return network


def change(network: Any, result: dither.Result) -> float:
    """Relative change of the logits on other data."""
    batch = network.batch(16, seed=9)
    true = network.logits(batch)
    return float((network.logits(batch, result.model) - true).norm() / true.norm())


def quantize(network: Any, **fields: Any) -> dither.Result:
    return dither.quantize(network.model, AWQ(weights=WEIGHTS, **fields), [network.batch(16)])


def test_scales_and_clips_each_lower_the_error(loud: Any) -> None:
    plain = dither.quantize(loud.model, RTN(weights=f"{WEIGHTS}:asym:tight:clampzero:minmax"), [loud.batch(16)])
    neither, scaled, both = quantize(loud, alphas=1, clip=False), quantize(loud, clip=False), quantize(loud)
    assert change(loud, neither) == change(loud, plain)
    assert change(loud, scaled) < 0.9 * change(loud, plain)  # measured: 0.81
    assert change(loud, both) < change(loud, scaled)
    remarks = {row["name"]: row["reason"] for row in both.report.data["coverage"]}
    norm = remarks["model.layers.0.input_layernorm"]
    assert norm.startswith("equalized with self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: alpha 0.")
    assert not norm.endswith("alpha 0")
    assert "equalized with mlp.down_proj: alpha 0" in remarks["model.layers.0.mlp.up_proj"]
    clipped = {row["name"].rpartition(".")[2]: row["notes"]["clipped"] for row in both.report.data["layers"]}
    assert {name for name, flag in clipped.items() if not flag} == {"q_proj", "k_proj"}


def test_folded_scales_do_not_change_what_the_network_computes(loud: Any) -> None:
    result = quantize(loud, overrides={"*": "int8:channel:asym:tight"}, clip=False)
    assert change(loud, result) < 0.04  # measured: 0.025
    norm = result.model.get_submodule("model.layers.0.input_layernorm").weight
    assert not torch.allclose(norm, loud.model.get_submodule("model.layers.0.input_layernorm").weight)


def test_scales_may_be_judged_by_what_the_block_puts_out(loud: Any) -> None:
    by_block, by_layers = quantize(loud, clip=False, judge="block"), quantize(loud, clip=False)
    plain = quantize(loud, clip=False, alphas=1)
    assert change(loud, by_block) < 0.9 * change(loud, plain)
    assert change(loud, by_block) != change(loud, by_layers)


def test_compensation_behind_scales_and_clips_helps_further(loud: Any) -> None:
    compensated = quantize(loud, rounding="columns")
    assert change(loud, compensated) < change(loud, quantize(loud))


def test_without_norms_only_ranges_are_searched() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    result = dither.quantize(model, AWQ(weights="int3"), x)
    assert all(row["notes"]["clipped"] for row in result.report.data["layers"])
