"""Plain folders of networks whose layers are not stored as torch's Linear does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
from dither.errors import InputError


def test_transposed_layers_are_written_as_their_class_stores_them(tiny: Callable[..., Any], tmp_path: Path) -> None:
    import transformers

    network = tiny("GPT2LMHeadModel")
    network.model.save_pretrained(tmp_path / "source")
    method = dither.RTN(weights="int4:g8:asym", skip=["*.1.mlp.c_fc"])
    result = dither.quantize(tmp_path / "source", method, [network.batch(2)])
    dither.export(result, "dequantized", tmp_path / "plain")
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    for name in ("h.0.attn.c_attn", "h.1.mlp.c_fc"):
        layer = result.model.transformer.get_submodule(name)
        weight = layer.weight if "c_fc" in name else layer.weight.T
        assert torch.equal(plain.transformer.get_submodule(name).weight, weight.half().float())
    batch = network.batch(2, seed=1)
    torch.testing.assert_close(network.logits(batch, plain), network.logits(batch, result.model), rtol=0.02, atol=0.02)


EXPERTS = {"MixtralForCausalLM": "sym", "Qwen2MoeForCausalLM": "asym", "GptOssForCausalLM": "asym"}


@pytest.mark.parametrize(("architecture", "zero"), EXPERTS.items())
def test_experts_are_put_together_again(tiny: Callable[..., Any], tmp_path: Path, architecture: str, zero: str) -> None:
    import transformers

    network = tiny(architecture)
    network.model.save_pretrained(tmp_path / "source")
    method = dither.RTN(weights=f"int4:g8:{zero}", skip=["*.1.mlp.experts.down_proj.0"])
    result = dither.quantize(tmp_path / "source", method, [network.batch(2)])
    made = dither.export(result, "dequantized", tmp_path / "plain")
    assert made["layers"] == len(result.report.data["layers"])
    plain = getattr(transformers, architecture).from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    batch = network.batch(2, seed=1)
    torch.testing.assert_close(network.logits(batch, plain), network.logits(batch, result.model), rtol=0.02, atol=0.02)
    assert not torch.allclose(network.logits(batch, plain), network.logits(batch, network.model), rtol=0.02, atol=0.02)


def test_other_forms_refuse_experts_taken_apart_with_what_opens_them(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("MixtralForCausalLM")
    network.model.save_pretrained(tmp_path / "source")
    result = dither.quantize(tmp_path / "source", dither.RTN(weights="int4:g8:sym"), [network.batch(2)])
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts: experts taken apart .* from_pretrained"):
        dither.export(result, "compressed-tensors", tmp_path / "plain")
