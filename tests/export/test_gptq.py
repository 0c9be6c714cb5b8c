"""GPTQ checkpoints: golden bytes, the zero-points' quirk, and what the format cannot hold."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dither
from dither.errors import InputError, SpecError
from dither.export.gptq import Setting, configuration, packed
from dither.export.integers import IntegerWeight

Quantized = Callable[..., dither.Result]
LAYER = "model.layers.0.self_attn.q_proj"


def weight_of(bits: int, outputs: int = 32, inputs: int = 32, group: int | None = None) -> IntegerWeight:
    """Codes that count up along the inputs; the zero-point in the middle; scale 1/2."""
    codes = (torch.arange(inputs) % 2**bits).to(torch.uint8).expand(outputs, inputs).contiguous()
    cells = (outputs, inputs // (group or inputs))
    zero = torch.full(cells, 2 ** (bits - 1), dtype=torch.int32)
    return IntegerWeight(codes, torch.full(cells, 0.5), zero, bits, group, True, False)


@pytest.mark.parametrize(
    ("bits", "word", "zero"),
    [(4, 0x76543210, 0x77777777), (8, 0x03020100, 0x7F7F7F7F), (2, 0xE4E4E4E4 - 2**32, 0x55555555)],
)
def test_words_count_from_the_lowest_bits_and_zero_points_are_less_one(bits: int, word: int, zero: int) -> None:
    parts = packed("layer", weight_of(bits), shift=1)
    assert parts["qweight"].shape == (bits, 32)
    assert set(parts["qweight"][0].tolist()) == {word}
    assert set(parts["qzeros"].flatten().tolist()) == {zero}


def test_version_2_holds_zero_points_themselves() -> None:
    parts = packed("layer", weight_of(4), shift=0)
    assert set(parts["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}


def test_three_bits_fill_three_words_with_32_codes() -> None:
    """Codes 10 and 21 cross words, as in the first GPTQ kernels."""
    weight = weight_of(3)
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:, 10], codes[:, 21] = 7, 7
    weight = IntegerWeight(codes, weight.scale, weight.zero_point, 3, None, True, False)
    parts = packed("layer", weight, shift=1)
    assert parts["qweight"][:, 0].tolist() == [0xC0000000 - 2**32, 0x80000001 - 2**32, 0b11]
    assert parts["qzeros"].shape == (1, 3)


def test_groups_follow_the_inputs() -> None:
    parts = packed("layer", weight_of(4, inputs=96, group=32), shift=1)
    assert parts["g_idx"].tolist() == [k // 32 for k in range(96)]
    assert {name: tuple(x.shape) for name, x in parts.items()} == {
        "qweight": (12, 32), "qzeros": (3, 4), "scales": (3, 32), "g_idx": (96,),
    }  # fmt: skip
    assert parts["scales"].dtype == torch.float16


@pytest.mark.parametrize(
    "weights", ["int4:g32:sym", "int3:g32:sym", "int8:channel:sym", "int2:g16:sym", "int4:tensor:sym"]
)
def test_a_symmetric_network_is_read_back_exactly(quantized: Quantized, tmp_path: Path, weights: str) -> None:
    report = dither.export(quantized(weights), "gptq", tmp_path / "gptq")
    assert report["largest_change"] == 0
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["sym"], config["desc_act"], config["checkpoint_format"]) == (True, False, "gptq")
    assert config == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())


def test_zero_points_need_version_2_where_one_is_0(quantized: Quantized, tmp_path: Path) -> None:
    result = quantized("int4:g16:asym")
    grid = result.model.get_submodule(LAYER).packed
    grid.zero_point[0, 0] = 0  # two zero-points of the first output
    with pytest.raises(SpecError, match="version 1 of gptq cannot hold a zero-point of 0"):
        dither.export(result, "gptq", tmp_path / "one")
    report = dither.export(result, "gptq-v2", tmp_path / "two")
    assert report["largest_change"] == 0
    assert "gibberish" in report["notes"][0]
    stored = load_file(tmp_path / "two" / "model.safetensors")[f"{LAYER}.qzeros"]
    assert int(stored[0, 0]) & 15 == 0


def test_layers_that_differ_or_are_kept_are_named_by_patterns(quantized: Quantized, tmp_path: Path) -> None:
    import re

    result = quantized("int4:g32:sym", overrides={"*.down_proj": "int8:sym"}, skip=["*.1.mlp.gate_proj"])
    report = dither.export(result, "gptq", tmp_path / "gptq")
    assert report["largest_change"] == 0
    dynamic = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["dynamic"]
    down = "model.layers.1.mlp.down_proj"
    found = [value for key, value in dynamic.items() if key.startswith("+:") and re.match(key[2:], down)]
    assert found == [{"bits": 8, "group_size": -1, "sym": True}]
    assert any(key.startswith("-:") and re.match(key[2:], "model.layers.1.mlp.gate_proj") for key in dynamic)
    assert not any("lm_head" in key for key in dynamic)


def test_the_most_frequent_setting_is_the_usual_one() -> None:
    one, two = Setting(4, 32, True), Setting(8, -1, True)
    config = configuration({"a": one, "b": two, "c": one}, {"a": "a", "b": "b", "c": "c"}, [], 1)
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert config["dynamic"] == {"+:^b$": {"bits": 8, "group_size": -1, "sym": True}}


def test_what_it_cannot_hold_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"5-bit codes .*: it has 2, 3, 4, 8 bits"):
        dither.export(quantized("int5:g32:sym"), "gptq", tmp_path / "x")
    with pytest.raises(SpecError, match="cannot hold quantized activations"):
        dither.export(quantized("int8:sym", activations="int8:token"), "gptq", tmp_path / "x")
    with pytest.raises(SpecError, match="multiples of 32 on both axes"):
        dither.export(quantized("int4:sym", {"intermediate_size": 72}), "gptq", tmp_path / "x")
    with pytest.raises(InputError, match="gptq holds scales in float16"):
        dither.export(quantized("int4:sym"), "gptq", tmp_path / "x", dtype="bfloat16")
