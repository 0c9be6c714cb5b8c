"""compressed-tensors: our own golden bytes, and its own library opens what we write to the same values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.export.conftest import logits

import dither
from dither.errors import InputError, SpecError
from dither.export.compressed_tensors import Scheme, configuration, packed, words
from dither.export.integers import integer_weight
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # the library warns about its own internals
LAYER = "model.layers.0.self_attn.q_proj"
Quantized = Callable[..., dither.Result]


def opened(folder: Path, **options: Any) -> Any:
    """The model of a folder as transformers opens it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def exported(source: dither.Result, tmp_path: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The export of a folder and its report."""
    folder = tmp_path / "ct"
    return folder, dither.export(source, "compressed-tensors", folder, **options)


def dense(source: dither.Result, tmp_path: Path) -> Any:
    """The same network with plain 16-bit weights."""
    dither.export(source, "dequantized", tmp_path / "dense")
    return opened(tmp_path / "dense")


# Streams written out by hand: 0, 1, 2, … in 3 bits is 000 100 010 110 001 101 011 111 | 000 …, lowest bit first.
GOLDEN = {
    2: ([0, 1, 2, 3] * 5, [0xE4E4E4E4 - 2**32, 0xE4]),
    3: (list(range(8)) * 2, [0x88FAC688 - 2**32, 0xFAC6]),
    4: ([15, 0, 1, 2, 3, 4, 5, 6, 7], [0x6543210F, 7]),
    5: ([31, 0, 31, 0, 31, 0, 31], [0xC1F07C1F - 2**32, 0x7]),
    6: ([63, 0, 63, 0, 63, 1], [0x3F03F03F | (1 << 30), 0]),
    8: ([1, 2, 3, 255, 5], [0xFF030201 - 2**32, 5]),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_codes_are_a_stream_that_crosses_words(bits: int) -> None:
    codes, expected = GOLDEN[bits]
    assert words(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [expected]


def test_the_tensors_of_a_layer_have_the_formats_names_shapes_and_bytes() -> None:
    weight = torch.tensor([[-8.0, 7, 0, 1, -1, 2, -2, 3], [0, 8, 15, 1, 2, 3, 4, 5]])
    spec = QuantSpec.parse("int4:g4:asym")
    stored = integer_weight("layer", quantize(weight, fit_grid(weight, spec)), "compressed-tensors", (4,))
    assert stored.zero_point.tolist() == [[8, 6], [0, 0]]
    parts = packed("layer", stored, Scheme(4, False, "group", 4, None), torch.float16)
    assert {name: list(x.shape) for name, x in parts.items()} == {
        "weight_packed": [2, 1], "weight_shape": [2], "weight_scale": [2, 2], "weight_zero_point": [1, 2],
    }  # fmt: skip
    assert parts["weight_shape"].tolist() == [2, 8]
    assert parts["weight_zero_point"].tolist() == [[0x08, 0x06]]  # along the outputs: row 0 in the low nibble
    assert parts["weight_packed"][0].item() & 0xFFFF == 0x98F0  # -8, 7, 0, 1 on the grid of step 1 and zero-point 8


def test_the_formats_own_library_unpacks_our_words() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    for bits in range(2, 9):
        codes = torch.randint(0, 2**bits, (5, 37), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
        found = unpack_from_int32(words(codes, bits), bits, torch.Size((5, 37)))
        assert torch.equal(found.int() + 2 ** (bits - 1), codes.int())


@pytest.mark.parametrize(
    "weights", ["int4:g32:sym", "int3:g32:sym", "int8:channel:sym", "int5:tensor:sym", "int2:g16:sym"]
)
def test_transformers_opens_symmetric_results_to_the_same_logits(
    quantized: Quantized, tmp_path: Path, weights: str
) -> None:
    source = quantized(weights)
    folder, report = exported(source, tmp_path)
    assert report["largest_change"] == 0
    assert torch.equal(logits(opened(folder)), logits(dense(source, tmp_path)))


@pytest.mark.parametrize("weights", ["int4:g32:asym", "int3:channel:asym", "int8:tensor:asym", "int6:g16:asym"])
def test_transformers_opens_asymmetric_results_dequantized(quantized: Quantized, tmp_path: Path, weights: str) -> None:
    from transformers import CompressedTensorsConfig

    source = quantized(weights)
    folder, report = exported(source, tmp_path)
    assert any("dequantize=True" in note for note in report["notes"])
    model = opened(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(model), logits(dense(source, tmp_path)))


def test_layers_of_several_formats_become_config_groups(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("int4:g32:sym", overrides={"*.down_proj": "int6:g16:sym", "*.0.self_attn.v_proj": "int8:sym"})
    folder, _ = exported(source, tmp_path)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8, 6]
    assert groups["group_1"]["targets"] == ["model.layers.0.self_attn.v_proj"]
    assert torch.equal(logits(opened(folder)), logits(dense(source, tmp_path)))


def test_what_is_left_out_is_ignored_by_name(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("int4:g32:sym", skip=["*.1.mlp.*"])
    folder, _ = exported(source, tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    mlp = [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(config["ignore"]) == sorted(["lm_head", *mlp])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert torch.equal(logits(opened(folder)), logits(dense(source, tmp_path)))


def test_a_quantized_head_that_was_tied_is_untied(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("int4:g32:sym", {"tie_word_embeddings": True}, overrides={"lm_head": "int4:g32:sym"})
    folder, report = exported(source, tmp_path)
    assert report["layers"] == 15
    model = opened(folder)
    assert torch.equal(logits(model), logits(dense(source, tmp_path)))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_eight_bit_activations_are_stored_with_plain_bytes(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("int8:channel:sym", activations="int8:token:sym")
    folder, report = exported(source, tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    assert load_file(folder / "model.safetensors")[f"{LAYER}.weight"].dtype == torch.int8
    assert report["largest_change"] == 0
    model, true = opened(folder), logits(source.model)
    assert float((logits(model).float() - true).norm() / true.norm()) < 0.06  # measured 0.027: borders of 8-bit codes
    assert torch.equal(model.get_submodule(LAYER).weight, source.model.get_submodule(LAYER).weight.half())


def test_static_activations_take_their_scale_along(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("int8:channel:sym", activations="int8:tensor:asym")
    folder, _ = exported(source, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert tensors[f"{LAYER}.input_scale"].shape == (1,)
    zero = source.model.get_submodule(LAYER).input_quantizer.zero_point
    assert int(tensors[f"{LAYER}.input_zero_point"]) == int(zero) - 128
    true = logits(source.model)
    assert float((logits(opened(folder)).float() - true).norm() / true.norm()) < 0.06  # measured 0.036


def test_the_library_reads_the_configuration_without_a_word(quantized: Quantized, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    folder, _ = exported(quantized("int4:g32:asym", overrides={"*.down_proj": "int8:sym"}), tmp_path)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored.pop("version")
    parsed = QuantizationConfig(**stored)
    assert parsed.config_groups["group_1"].weights.num_bits == 8
    assert configuration({}, {}, [])["ignore"] == []


def test_scales_are_rounded_only_when_asked(quantized: Quantized, tmp_path: Path) -> None:
    _, report = exported(quantized("int4:g32:sym"), tmp_path, dtype="bfloat16")
    assert 0 < report["largest_change"] < 2**-8
    assert report["dtype"] == "bfloat16"
    assert report["exact_layers"] < report["layers"]


REFUSED = {
    "int4:asym:realzero": "zero-points that are no integers",
    "int4:g32:ic": "groups along the outputs",
    "int4:dual": "two grids a row",
    "int1:sym": "1-bit codes",
    "nf4:g32": "no uniform grid",
}


@pytest.mark.parametrize("weights", REFUSED)
def test_what_the_format_cannot_hold_is_refused_with_layer_reason_and_way_out(
    quantized: Quantized, tmp_path: Path, weights: str
) -> None:
    with pytest.raises(SpecError, match=REFUSED[weights]) as error:
        exported(quantized(weights), tmp_path)
    assert str(error.value).startswith(LAYER)
    assert "--to dequantized" in str(error.value)
    assert not (tmp_path / "ct").exists()


def test_zero_points_outside_of_the_codes_are_refused() -> None:
    weight = torch.arange(8.0).reshape(2, 4) + 5
    stored = quantize(weight, fit_grid(weight, QuantSpec.parse("int4:asym:tight")))
    with pytest.raises(SpecError, match="layer: gptq cannot hold zero-points outside of the codes"):
        integer_weight("layer", stored, "gptq", (4,))


def test_quantized_attention_and_odd_activations_are_refused(quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="activations in int4"):
        exported(quantized("int8:sym", activations="int4:tensor"), tmp_path)
    with pytest.raises(InputError, match="do not quantize the operands of attention"):
        exported(quantized("int8:sym", activations="int8:token", attention="int8:token"), tmp_path)


def test_a_scale_that_does_not_fit_the_type_is_refused(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.export.source import Source

    read: Callable[[Source], Any] = Source.kept

    def huge(self: Source) -> Any:
        yield from ((name, x * 1e6 if name == "lm_head.weight" else x) for name, x in read(self))

    monkeypatch.setattr(Source, "kept", huge)
    with pytest.raises(InputError, match=r"lm_head.weight: .* does not fit into float16; export with --dtype bfloat16"):
        exported(quantized("int4:g32:sym"), tmp_path)


def test_the_tokens_of_a_prompt_stay_what_they_were(quantized: Quantized, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = quantized("int4:g32:sym")
    folder, report = exported(source, tmp_path)
    text = "the cat is in an inn."
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(tmp_path / "llama")(text)
    assert "generation_config.json" in [file["name"] for file in report["files"]]
