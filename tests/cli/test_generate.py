"""`dither generate`: what a model writes, before and after."""

from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Run, error_line
from tests.export.conftest import save_language_model

import dither


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama with a tokenizer, and its quantized copy."""
    base = tmp_path_factory.mktemp("generate")
    save_language_model(base / "llama")
    method = dither.RTN(weights="int4:g32:sym")
    dither.quantize(base / "llama", method, [{"input_ids": torch.ones(1, 4).long()}], output=base / "out")
    return base / "llama", base / "out"


def test_texts_stand_side_by_side(run: Run, folders: tuple[Path, Path]) -> None:
    done = run("generate", folders[1], "--prompt", "the cat", "--max-new-tokens", 6)
    assert done.code == 0, done.err
    assert "Original" in done.out
    assert "Quantized" in done.out
    assert "tokens a second" in done.out


def test_json_holds_tokens_and_where_they_first_differ(run: Run, folders: tuple[Path, Path]) -> None:
    options = ("--max-new-tokens", 6, "--temperature", 0.9, "--top-k", 5, "--seed", 1, "--json")
    data = run(
        "generate", folders[1], "--prompt", "the cat", "--prompt", "an inn", "--reference", folders[0], *options
    ).data
    assert [text["prompt"] for text in data["texts"]] == ["the cat", "an inn"]
    text = data["texts"][0]
    same = text["same_tokens"]
    assert text["tokens"][:same] == text["original"]["tokens"][:same]


def test_a_model_without_an_original_writes_alone(run: Run, folders: tuple[Path, Path]) -> None:
    done = run("generate", folders[0], "--prompt", "the cat", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert "Original" not in done.out
    itself = run("generate", folders[0], "--reference", folders[0], "--prompt", "the cat", "--max-new-tokens", 3)
    assert "the same text" in itself.out


def test_a_prompt_that_is_too_long_is_refused(run: Run, folders: tuple[Path, Path]) -> None:
    line = error_line(run("generate", folders[0], "--prompt", "the cat", "--max-new-tokens", 64))
    assert "are more than the 64 that it reads" in line
