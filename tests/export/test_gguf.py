"""GGUF: golden blocks, the `gguf` package decodes our codes, and transformers opens the file to the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.export.conftest import logits

import dither
from dither.errors import InputError, SpecError
from dither.export.gguf import block_type, blocks
from dither.export.gguf_tokenizer import read_vocabulary
from dither.export.integers import integer_weight
from dither.export.source import open_source
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec

Quantized = Callable[..., dither.Result]
pytestmark = pytest.mark.filterwarnings("ignore")  # the reader maps files read-only


def stored(text: str, rows: int = 3, columns: int = 64, shift: float = 0.0) -> Any:
    """A random weight in a format, as integers."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + shift
    return integer_weight("layer", quantize(weight, fit_grid(weight, QuantSpec.parse(text))), "gguf", (4, 8))


def test_a_block_of_four_bits_is_a_scale_and_two_halves() -> None:
    weight = stored("int4:g32:sym", rows=1, columns=32)
    codes = torch.arange(32) % 16
    weight = type(weight)(codes[None].to(torch.uint8), torch.full((1, 1), 0.5), weight.zero_point, 4, 32, True, False)
    found = blocks(weight, "Q4_0")[0].tolist()
    assert found[:2] == [0x00, 0x38]  # 0.5 in float16
    assert found[2:] == [k | k << 4 for k in range(16)]


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [("int4:g32:sym", "Q4_0", 18), ("int4:g32:asym", "Q4_1", 20), ("int8:g32:sym", "Q8_0", 34)],
)
def test_the_gguf_package_decodes_our_blocks(text: str, kind: str, size: int) -> None:
    weight = stored(text, shift=0.3)
    rows = blocks(weight, block_type("layer", weight, {"activations": None}))
    assert rows.shape == (3, 2 * size)
    found = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    column = torch.arange(64) // 32
    true = weight.scale[:, column] * (weight.codes.int() - weight.zero_point[:, column])
    rounding = 2.0**-11 * (weight.scale * weight.zero_point).max() if kind == "Q4_1" else 0.0
    assert np.abs(found - true.numpy()).max() <= rounding


@pytest.mark.parametrize("text", ["int4:g64:sym", "int4:channel:sym", "int8:tensor:sym"])
def test_wider_groups_repeat_their_scale(text: str) -> None:
    weight = stored(text, rows=2, columns=128)
    kind = block_type("layer", weight, {"activations": None})
    found = gguf.quants.dequantize(blocks(weight, kind).numpy(), gguf.GGMLQuantizationType[kind])
    column = torch.arange(128) // (weight.group_size or 128)
    true = weight.scale[:, column] * (weight.codes.int() - weight.zero_point[:, column])
    assert np.array_equal(found, true.numpy())


def opened(folder: Path) -> Any:
    """The model of the only GGUF file in a folder, as transformers opens it."""
    from transformers import AutoModelForCausalLM

    file = next(folder.glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("weights", ["int4:g32:sym", "int4:g32:asym", "int8:g32:sym"])
def test_transformers_opens_the_file_to_the_same_logits(quantized: Quantized, tmp_path: Path, weights: str) -> None:
    """Query and key rows are interleaved in the file, so a wrong order of heads would show."""
    result = quantized(weights)
    report = dither.export(result, "gguf", tmp_path / "gguf", dtype="float32")
    limit = 1e-2 if "asym" in weights else 1e-5  # Q4_1 rounds minima to float16, measured 0.003; else float32 sums
    assert torch.allclose(logits(opened(tmp_path / "gguf")), logits(result.model), atol=limit)
    assert (report["largest_change"] == 0) == ("asym" not in weights)


def test_the_prompt_gets_the_same_tokens(quantized: Quantized, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    dither.export(quantized("int4:g32:sym"), "gguf", tmp_path / "gguf")
    file = next((tmp_path / "gguf").glob("*.gguf"))
    mine = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file=file.name)
    text = "the cat is in an inn."
    assert mine(text)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "llama")(text)["input_ids"]


def test_the_file_says_what_llama_cpp_asks_for(quantized: Quantized, tmp_path: Path) -> None:
    result = quantized("int4:g32:sym", overrides={"*.down_proj": "int8:g32:sym"})
    dither.export(result, "gguf", tmp_path / "gguf")
    path = next((tmp_path / "gguf").glob("*-Q4_0.gguf"))
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["llama.rope.freq_base"] == 500.0
    assert fields["general.file_type"] == 2
    assert fields["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD39]"
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 1]
    assert fields["tokenizer.ggml.merges"] == ["t h", "th e", "i n", "a n"]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.1.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "F16"
    assert kinds["output_norm.weight"] == "F32"


def test_llama_3_frequencies_are_a_tensor(quantized: Quantized, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8, "rope_theta": 500.0,
    }  # fmt: skip
    result = quantized("int4:g32:sym", {"rope_parameters": rope})
    dither.export(result, "gguf", tmp_path / "gguf")
    reader = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf")))
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 500.0 ** (-torch.arange(8) / 8)
    assert torch.allclose(plain / torch.tensor(factors), result.model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_another_architecture_keeps_the_order_of_its_rows(tmp_path: Path) -> None:
    from tests.conftest import randomize
    from tests.export.conftest import save_tokenizer, tokens
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=32,
    )  # fmt: skip
    folder = tmp_path / "qwen"
    randomize(Qwen2ForCausalLM(config)).save_pretrained(folder)
    save_tokenizer(folder)
    method = dither.RTN(weights="int4:g32:sym", activations="none")
    result = dither.quantize(folder, method, [{"input_ids": tokens()}])
    dither.export(result, "gguf", tmp_path / "gguf", dtype="float32")
    assert torch.allclose(logits(opened(tmp_path / "gguf")), logits(result.model), atol=1e-5)


def test_what_it_cannot_hold_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    for weights, reason in {
        "int3:g32:sym": "3-bit codes .*: it has 4, 8 bits",
        "int8:g32:asym": "8-bit codes with zero-points",
        "int4:g16:sym": "groups of 16 columns: its blocks are 32",
    }.items():
        with pytest.raises(SpecError, match=reason):
            dither.export(quantized(weights), "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_other_architectures_and_a_missing_tokenizer_are_refused(
    tiny: Callable[..., Any], quantized: Quantized, tmp_path: Path
) -> None:
    network = tiny("ViTForImageClassification")
    vit = dither.quantize(network.model, dither.RTN(weights="int4:sym", activations="none"), network.batch(2))
    with pytest.raises(InputError, match="expected one of the model types llama, mistral, qwen2, qwen3, got vit"):
        dither.export(vit, "gguf", tmp_path / "gguf")
    result = quantized("int4:g32:sym")
    (tmp_path / "llama" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        dither.export(result, "gguf", tmp_path / "gguf")


def test_tokenizers_of_pieces_get_scores_in_the_order_of_their_merges(quantized: Quantized, tmp_path: Path) -> None:
    result = quantized("int4:g32:sym")
    path = tmp_path / "llama" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["byte_fallback"] = True
    data["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}
    path.write_text(json.dumps(data))
    vocabulary = read_vocabulary(open_source(result))
    assert vocabulary.model == "llama"
    assert vocabulary.adds_bos
    score = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert score["th"] > score["the"] > score["in"] > score["an"] > score["b"]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel"}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": r"(?i:'s)|\p{N}{1,3}|x"}}, {"type": "ByteLevel"}], "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": r"(?i:'s)|\p{N}|x"}}, {"type": "ByteLevel"}], "qwen2"),
        ([{"type": "Whitespace"}], "default"),
    ],
)
def test_the_way_text_is_cut_has_a_name(quantized: Quantized, tmp_path: Path, steps: list[Any], name: str) -> None:
    from dither.export.gguf_tokenizer import _pre_tokenizer

    assert _pre_tokenizer({"type": "Sequence", "pretokenizers": steps}) == name
