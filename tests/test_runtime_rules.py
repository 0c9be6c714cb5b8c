"""Plans are checked against the runtime that the result is for, before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dither
from dither.errors import InputError


def test_a_plan_says_what_a_runtime_has_against_it(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    method = dither.RTN(weights="int3:g16:sym", overrides={"*.k_proj": "int4:g16:sym"})
    plan = dither.plan(network.model, method, [network.batch(2)], runtime="sglang")
    found = {finding["problem"]: finding for finding in plan["findings"]}
    assert found["codes of 3 bits: it reads 4 and 8 only"]["more"] == 11
    fused = next(finding for problem, finding in found.items() if problem.endswith("of q_proj"))
    assert fused["layer"] == "model.layers.0.self_attn.k_proj"
    assert dither.plan(network.model, method, [network.batch(2)])["findings"] == []


def test_a_run_for_a_runtime_is_refused_before_it_begins(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("LlamaForCausalLM")
    with pytest.raises(InputError, match=r"would not run in onnx: model.layers.0.self_attn.q_proj \(and 13 more"):
        dither.quantize(
            network.model, dither.RTN(weights="int3:sym"), [network.batch(2)], output=tmp_path / "out", runtime="onnx"
        )
    assert not (tmp_path / "out").exists()


def test_what_a_method_adds_to_codes_and_convolutions_are_known(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    plan = dither.plan(network.model, "spqr", [network.batch(2)], runtime="vllm")
    assert plan["findings"][0]["problem"] == "the method stores sparse outliers beside the codes"
    vit = tiny("ViTForImageClassification")
    plan = dither.plan(vit.model, dither.RTN(weights="int4:sym"), vit.batch(2), runtime="onnx")
    assert [finding["layer"] for finding in plan["findings"]] == ["vit.embeddings.patch_embeddings.projection"]
