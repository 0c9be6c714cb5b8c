"""Experts taken apart compute what the fused ones do, and share their memory until they change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dither
from dither.nn.experts import ExpertLinear, Experts, everyone_called, is_fused, unfuse

NAMES = ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM"]
pytestmark = pytest.mark.filterwarnings("ignore:.*grouped_mm.*")


@pytest.mark.parametrize("name", NAMES)
def test_experts_taken_apart_compute_what_the_fused_ones_do(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    apart, batch = copy.deepcopy(network.model), network.batch(3)
    assert unfuse(apart) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert unfuse(apart) == []
    true = network.logits(batch)
    torch.testing.assert_close(network.logits(batch, apart), true, rtol=1e-4, atol=1e-4)
    with everyone_called(apart):
        torch.testing.assert_close(network.logits(batch, apart), true, rtol=1e-4, atol=1e-4)
    counts = [sum(p.numel() for p in model.parameters()) for model in (apart, network.model)]
    assert counts[0] == counts[1]


def test_the_matrices_are_views_of_the_fused_parameters(tiny: Callable[..., Any]) -> None:
    fused = tiny("MixtralForCausalLM").model.model.layers[0].mlp.experts
    storage = fused.gate_up_proj.untyped_storage().data_ptr()
    experts = Experts(fused)
    layers = [module for module in experts.modules() if isinstance(module, ExpertLinear)]
    assert len(layers) == 8 and layers[0].weight.untyped_storage().data_ptr() == storage
    assert layers[0].weight.shape == (96, 32) and layers[-1].weight.shape == (32, 48)


def test_only_experts_that_were_chosen_are_called_unless_all_are_to_be(tiny: Callable[..., Any]) -> None:
    experts = Experts(tiny("MixtralForCausalLM").model.model.layers[0].mlp.experts)
    called: list[str] = []
    for name, module in experts.named_modules():
        if isinstance(module, ExpertLinear):
            module.register_forward_pre_hook(lambda _module, args, name=name: called.append(f"{name} {len(args[0])}"))
    x, chosen = torch.ones(5, 32), torch.tensor([[1, 2], [1, 2], [2, 1], [1, 2], [2, 3]])
    out = experts(x, chosen, torch.ones(5, 2))
    assert called == [f"{part}.{k} {n}" for k, n in ((1, 4), (2, 5), (3, 1)) for part in ("gate_up_proj", "down_proj")]
    called.clear()
    with everyone_called(experts):
        assert torch.equal(experts(x, chosen, torch.ones(5, 2)), out)
    assert called[:2] == ["gate_up_proj.0 5", "down_proj.0 5"] and len(called) == 8


def test_other_modules_are_not_taken_apart() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 4, 3)), nn.Parameter(torch.ones(2, 3, 2))

    assert not is_fused(Other())
    assert unfuse(nn.Sequential(Other())) == []


def test_an_expert_that_no_token_reaches_is_measured_on_all_and_says_so(tiny: Callable[..., Any]) -> None:
    network = tiny("MixtralForCausalLM", num_local_experts=8)
    rows = dither.quantize(network.model, dither.METHODS["gptq"](), [network.batch(1, size=2)]).report.data["coverage"]
    experts = [row for row in rows if ".experts." in row["name"]]
    assert len(experts) == 2 * 8 * 2 and all(row["status"] == "quantized" for row in experts)
    unreached = [row for row in experts if "chose it for no calibration token" in row["reason"]]
    assert len(unreached) >= 2 * 2 * 4  # two tokens of two experts each reach four at most
