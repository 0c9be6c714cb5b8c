"""Runs on models that are read block by block: the same bytes as when they are read whole."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dither
from dither import pipeline, storage
from dither.errors import InputError, NonFiniteError
from dither.evaluation.language import answer
from dither.models import streaming

ERQ = dither.ERQ(weights="int3", activations="int4", inputs="both", refine_steps=2)


class StopError(Exception):
    """The interruption."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny embeddings count as large, shards are small, and no report is drawn."""
    monkeypatch.setattr(streaming, "LARGE", 4000)
    monkeypatch.setattr(storage, "SHARD_BYTES", 12_000)
    monkeypatch.setattr("dither.report.html.write_html", lambda data, path: path.write_text("a report"))


@pytest.fixture
def llama(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """A tiny Llama in bfloat16, in two shards."""
    tiny("LlamaForCausalLM").model.bfloat16().save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


@pytest.fixture
def batches(tiny: Callable[..., Any]) -> list[Any]:
    network = tiny("LlamaForCausalLM")
    return [network.batch(2, seed) for seed in range(2)]


def written(folder: Path) -> dict[str, bytes]:
    """All files but the report, which tells the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report")}


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    rows = [{key: value for key, value in row.items() if key != "time_s"} for row in report["layers"]]
    return {"layers": rows, "operands": report["operands"], "coverage": report["coverage"]}


@pytest.mark.parametrize(
    "method", ["rtn", dither.GPTQ(weights="int4:g8"), ERQ, dither.GPTQ(skip=("model.layers.0.*",))]
)
def test_a_streamed_run_writes_the_same_bytes_in_the_same_shards(
    llama: Path, batches: list[Any], tmp_path: Path, method: Any
) -> None:
    whole = dither.quantize(llama, method, batches, output=tmp_path / "whole", stream=False)
    streamed = dither.quantize(llama, method, batches, output=tmp_path / "streamed", stream=True, spill_budget=0)
    assert written(tmp_path / "whole") == written(tmp_path / "streamed")
    assert len(list((tmp_path / "whole").glob("model-*-of-*.safetensors"))) > 1
    assert not (tmp_path / "whole" / "model.safetensors").exists()
    assert not (tmp_path / "streamed" / "unfinished").exists()
    assert untimed(whole.report.data) == untimed(streamed.report.data)
    totals = streamed.report.data["totals"]
    assert {**totals, "time_s": 0, "expected_memory_bytes": 0, "peak_rss_bytes": 0} == {
        **whole.report.data["totals"], "time_s": 0, "expected_memory_bytes": 0, "peak_rss_bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_experts_are_streamed_stored_one_by_one_or_as_one_turned_and_with_biases(
    tiny: Callable[..., Any], batches: list[Any], tmp_path: Path, name: str
) -> None:
    tiny(name).model.bfloat16().save_pretrained(tmp_path / "experts", max_shard_size="20KB")
    for output, stream in (("whole", False), ("streamed", True)):
        result = dither.quantize(tmp_path / "experts", "gptq", batches, output=tmp_path / output, stream=stream)
    assert written(tmp_path / "whole") == written(tmp_path / "streamed")
    assert any(".experts.down_proj.1" in row["name"] for row in result.report.data["layers"])


def test_the_result_of_a_streamed_run_answers_and_can_be_saved_again(
    llama: Path, batches: list[Any], tmp_path: Path
) -> None:
    result = dither.quantize(llama, "gptq", batches, output=tmp_path / "out", stream=True)
    with torch.no_grad():
        answer = result.model(**batches[0]).logits
        assert torch.equal(dither.load(tmp_path / "out")(**batches[0]).logits, answer)
        kind = transformers.AutoModelForCausalLM
        assert torch.equal(kind.from_pretrained(tmp_path / "out", dtype=torch.float32)(**batches[0]).logits, answer)
    result.save(tmp_path / "again")
    assert written(tmp_path / "out") == written(tmp_path / "again")


def test_tied_weights_are_stored_once(tiny: Callable[..., Any], batches: list[Any], tmp_path: Path) -> None:
    tiny("LlamaForCausalLM", tie_word_embeddings=True).model.save_pretrained(tmp_path / "llama")
    for name, stream in (("whole", False), ("streamed", True)):
        result = dither.quantize(tmp_path / "llama", "rtn", batches, output=tmp_path / name, stream=stream)
    assert written(tmp_path / "whole") == written(tmp_path / "streamed")
    with torch.no_grad():
        answers = [result.model(**batches[0]).logits, dither.load(tmp_path / "whole")(**batches[0]).logits]
    assert torch.equal(*answers)


@pytest.mark.parametrize("large", [400, 2**25])
def test_layers_outside_of_blocks_are_units_whether_they_are_streamed_or_stay(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(streaming, "LARGE", large)
    network = tiny("ViTForImageClassification")
    network.model.save_pretrained(tmp_path / "vit")
    for name, stream in (("whole", False), ("streamed", True)):
        result = dither.quantize(tmp_path / "vit", ERQ, network.batch(3), output=tmp_path / name, stream=stream)
    assert written(tmp_path / "whole") == written(tmp_path / "streamed")
    assert result.network.weights is not None
    assert len(result.network.weights.parts) == (4 if large == 400 else 2)
    with torch.no_grad():
        loaded = dither.load(tmp_path / "whole")(network.batch(2)).logits
        assert torch.equal(result.model(network.batch(2)).logits, loaded)


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_an_interrupted_run_is_resumed_in_either_mode(
    llama: Path, batches: list[Any], tmp_path: Path, first: bool, then: bool
) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done == 2:
            raise StopError

    with pytest.raises(StopError):
        dither.quantize(llama, ERQ, batches, output=tmp_path / "out", stream=first, progress=interrupt)
    dither.quantize(llama, ERQ, batches, output=tmp_path / "out", stream=then, resume=True)
    dither.quantize(llama, ERQ, batches, output=tmp_path / "whole", stream=False)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_the_plan_of_a_streamed_run_needs_less_memory_and_states_what_the_run_expects(
    llama: Path, batches: list[Any], tmp_path: Path
) -> None:
    plans = {stream: pipeline.plan(llama, "gptq", batches, stream=stream) for stream in (True, False)}
    assert plans[True]["memory_bytes"] < plans[False]["memory_bytes"]
    assert plans[True]["streamed"]
    assert not plans[False]["streamed"]
    result = dither.quantize(llama, "gptq", batches, output=tmp_path / "out", stream=True)
    assert result.report.data["totals"]["expected_memory_bytes"] == plans[True]["memory_bytes"]
    assert plans[True] | {"memory_bytes": 0, "streamed": 0, "estimated_time_s": 0} == plans[False] | {
        "memory_bytes": 0, "streamed": 0, "estimated_time_s": 0,
    }  # fmt: skip


def test_a_model_too_large_for_memory_is_streamed_by_itself_and_one_that_cannot_be_says_so(
    llama: Path, batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "exceeds_memory", lambda *_: True)
    assert dither.quantize(llama, "rtn", batches, output=tmp_path / "out").network.weights is not None
    assert dither.quantize(llama, "rtn", batches).network.weights is None  # there is nowhere to put finished units
    assert pipeline.plan(llama, "rtn", batches)["streamed"]
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with caplog.at_level(logging.WARNING):
        assert not pipeline.plan(llama, "rtn", batches)["streamed"]
    assert "which the model ties; all of it is read into memory" in caplog.text


def test_streaming_without_a_folder_or_an_output_is_refused(
    tiny: Callable[..., Any], llama: Path, batches: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="needs an output"):
        dither.quantize(llama, "rtn", batches, stream=True)
    with pytest.raises(InputError, match="a module in memory cannot be read block by block"):
        dither.quantize(tiny("LlamaForCausalLM").model, "rtn", batches, output=tmp_path / "out", stream=True)


def test_a_value_that_is_not_finite_is_found_in_its_shard(
    tiny: Callable[..., Any], batches: list[Any], tmp_path: Path
) -> None:
    network = tiny("LlamaForCausalLM")
    with torch.no_grad():
        network.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    network.model.save_pretrained(tmp_path / "llama")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        dither.quantize(tmp_path / "llama", "rtn", batches, output=tmp_path / "out", stream=True)


def test_a_streamed_result_is_evaluated_like_a_loaded_one(llama: Path, batches: list[Any], tmp_path: Path) -> None:
    result, windows = dither.quantize(llama, "rtn", batches, output=tmp_path / "out", stream=True), batches[0]
    found = answer(result.model, windows["input_ids"])
    assert found.perplexity == answer(dither.load(tmp_path / "out"), windows["input_ids"]).perplexity
