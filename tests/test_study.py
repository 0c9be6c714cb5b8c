"""The study of generated text: what it measures, on texts whose answers are known."""

from pathlib import Path
from typing import Any

import pytest
from tests.export.conftest import save_language_model

from dither.errors import InputError, SpecError
from dither.study import FULL, Knobs, study_generation

KNOBS = Knobs((0.0, 0.7), (4, 8), (5, 20), seeds=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    return save_language_model(tmp_path_factory.mktemp("study") / "llama")


@pytest.fixture(scope="module")
def data(llama: Path) -> dict[str, Any]:
    """A small study."""
    return study_generation(llama, ["nf4:g32", "int8:sym/int8:token:sym"], ["the cat", "an inn"], KNOBS).data


def test_every_setting_has_a_row_for_every_format(data: dict[str, Any]) -> None:
    assert [one["format"] for one in data["formats"]] == [FULL, "nf4:g32", "int8:sym/int8:token:sym"]
    assert len(data["rows"]) == 3 * 2 * (1 + 2)
    keys = {(row["format"], row["temperature"], row["top_k"], row["new_tokens"]) for row in data["rows"]}
    assert len(keys) == len(data["rows"])
    assert {row["texts"] for row in data["rows"] if row["temperature"] == 0} == {2}
    assert {row["texts"] for row in data["rows"] if row["temperature"] > 0} == {4}


def test_full_precision_agrees_with_itself(data: dict[str, Any]) -> None:
    own = [row for row in data["rows"] if row["format"] == FULL]
    assert {row["agreement"] for row in own} == {1.0}
    assert all(row["common_start"] * row["texts"] == pytest.approx(row["tokens"]) for row in own)


def test_eight_bits_write_more_alike_than_four_and_likelihoods_are_the_full_models(data: dict[str, Any]) -> None:
    mean = {
        name: sum(row["common_start"] for row in data["rows"] if row["format"] == name)
        for name in ("nf4:g32", "int8:sym/int8:token:sym")
    }
    assert mean["int8:sym/int8:token:sym"] > mean["nf4:g32"]
    greedy = {row["format"]: row["perplexity"] for row in data["rows"] if row["temperature"] == 0}
    assert greedy[FULL] > 1


def test_sizes_and_speeds_are_known(data: dict[str, Any]) -> None:
    sizes = {one["format"]: one["size_bytes"] for one in data["formats"]}
    assert sizes["nf4:g32"] < sizes["int8:sym/int8:token:sym"] < sizes[FULL]
    assert data["formats"][1]["bits_per_weight"] == pytest.approx(4.5)
    assert all(one["tokens_per_s"] > 0 for one in data["formats"])


def test_impossible_studies_are_refused(llama: Path) -> None:
    with pytest.raises(InputError, match="at least one temperature"):
        Knobs(temperatures=())
    with pytest.raises(SpecError, match="only nf4 and fp4 are defined"):
        study_generation(llama, ["nf5"], ["the cat"], KNOBS)
    with pytest.raises(InputError, match="tokens are more than the 64"):
        study_generation(llama, ["nf4:g32"], ["the cat"], Knobs((0.0,), (100,), (1,)))
