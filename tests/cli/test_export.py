"""`dither export` and what it says."""

from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Run, error_line
from tests.conftest import randomize

import dither


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quantized Llama of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    method = dither.RTN(weights="int4:g32:sym", activations="none")
    result = dither.quantize(randomize(LlamaForCausalLM(config)), method, [{"input_ids": torch.ones(1, 4).long()}])
    result.save(folder / "out")
    return folder / "out"


def test_an_export_says_what_was_read_back_and_what_opens_it(run: Run, llama: Path) -> None:
    done = run("export", llama, "--to", "compressed-tensors", "-o", "ct")
    assert done.code == 0, done.err
    assert "7 layers read back: every weight decodes to the same values" in done.out
    assert "opens with vLLM, SGLang, or transformers with compressed-tensors installed; saved in ct" in done.out
    assert Path("ct/config.json").is_file()


def test_json_holds_the_report_alone(run: Run, llama: Path) -> None:
    done = run("export", llama, "--to", "dequantized", "-o", "dense", "--dtype", "bfloat16", "--json")
    assert done.err == ""
    data = done.data
    assert (data["kind"], data["layers"], data["dtype"]) == ("export", 7, "bfloat16")
    assert {file["name"] for file in data["files"]} >= {"config.json", "model.safetensors"}


def test_a_refusal_is_one_line_and_leaves_nothing(run: Run, llama: Path) -> None:
    line = error_line(run("export", llama, "--to", "onxx", "-o", "x"))
    assert "did you mean 'onnx'" in line
    assert "does not exist" in error_line(run("export", "nowhere", "--to", "gguf", "-o", "x"))
    assert not Path("x").exists()


def test_a_dry_run_for_a_runtime_shows_its_rules_and_fails_where_it_must(
    run: Run, tiny_model: Path, calibration: Path
) -> None:
    command = ("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "--dry-run", "--for")
    refused = run(*command, "vllm", "--weights", "int4:asym")
    assert refused.code == 1
    assert "vllm, would not run: " in refused.out
    fine = run(*command, "transformers", "--weights", "int4:sym")
    assert fine.code == 0
    assert "the result would run in transformers" in fine.out
    assert run(*command, "transformers", "--weights", "int4:sym", "--json").data["runtime"] == "transformers"
