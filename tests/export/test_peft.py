"""Adapters that peft loads over the exported base compute what the quantized network does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.conftest import logits, tokens

import dither
from dither.errors import InputError
from dither.methods import QERA


def adapted(folder: Path, kind: str) -> Any:
    import transformers

    peft = pytest.importorskip("peft")
    base = getattr(transformers, kind).from_pretrained(folder / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("factors", ["float16", "int8"])
def test_the_adapter_over_the_base_is_the_quantized_network(
    llama: Callable[..., Path], tmp_path: Path, factors: Any
) -> None:
    method = QERA(weights="int3:g16", rank=4, factors=factors, skip=["*.0.mlp.up_proj"])
    result = dither.quantize(llama(), method, [{"input_ids": tokens()}])
    report = dither.export(result, "peft", tmp_path / "out", dtype="float32")
    assert {"adapter_config.json", "adapter_model.safetensors", "base/config.json"} <= {
        f["name"] for f in report["files"]
    }
    model = adapted(tmp_path / "out", "LlamaForCausalLM")
    expected, found = logits(result.model), logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert float((logits(model) - expected).norm() / expected.norm()) > 0.05
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_layers_of_another_rank_and_transposed_ones_are_named(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("GPT2LMHeadModel", num_hidden_layers=1)
    network.model.save_pretrained(tmp_path / "source")
    result = dither.quantize(tmp_path / "source", QERA(weights="int3:g8", rank=4), [network.batch(2)])
    dither.export(result, "peft", tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    assert config["rank_pattern"] == {}
    model = adapted(tmp_path / "out", "GPT2LMHeadModel")
    batch = network.batch(2, seed=1)
    torch.testing.assert_close(network.logits(batch, model), network.logits(batch, result.model), rtol=1e-4, atol=1e-4)


def test_a_network_without_corrections_is_refused(llama: Callable[..., Path], tmp_path: Path) -> None:
    result = dither.quantize(llama(), "rtn", [{"input_ids": tokens()}])
    with pytest.raises(InputError, match=r"no low-rank terms .* qera or lorc"):
        dither.export(result, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
