"""Parts that come from files: one in memory at a time, the same answers, and a clear word where it cannot be done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dither.errors import InputError
from dither.models import streaming
from dither.models.anatomy import read_anatomy
from dither.models.network import Network, open_network
from dither.models.streaming import exceeds_memory


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny embeddings count as large."""
    monkeypatch.setattr(streaming, "LARGE", 4000)


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """A tiny Llama in bfloat16, in two shards."""
    tiny("LlamaForCausalLM").model.bfloat16().save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) == 2
    return tmp_path / "llama"


def loaded(network: Network) -> list[str]:
    """The parts with a parameter in memory."""
    modules = {name: network.model.get_submodule(name) for name in network.weights.parts}  # type: ignore[union-attr]
    return [name for name, one in modules.items() if any(p.device.type != "meta" for p in one.parameters())]


def test_a_streamed_model_answers_as_the_whole_one_with_one_part_in_memory(
    tiny: Callable[..., Any], folder: Path
) -> None:
    whole, streamed = open_network(folder), open_network(folder, stream=True)
    batch, seen = tiny("LlamaForCausalLM").batch(2), []
    for name in streamed.weights.parts:  # type: ignore[union-attr]
        streamed.model.get_submodule(name).register_forward_hook(lambda *_: seen.append(loaded(streamed)))
    with torch.no_grad():
        assert torch.equal(streamed.run(batch).logits, whole.run(batch).logits)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    assert seen == [[part] for part in parts]
    assert streamed.weights is not None
    streamed.weights.release()
    assert loaded(streamed) == []
    assert streamed.model.model.norm.weight.device.type == "cpu"  # type: ignore[union-attr]


def test_state_and_anatomy_are_those_of_the_whole_model(tiny: Callable[..., Any], folder: Path) -> None:
    whole, streamed = open_network(folder), open_network(folder, stream=True)
    for (name, x), (other, y) in zip(whole.tensors(), streamed.tensors(), strict=True):
        assert (name, x.dtype) == (other, y.dtype)
        assert torch.equal(x, y)
    batch = tiny("LlamaForCausalLM").batch(2)
    found = [read_anatomy(one.model, lambda one=one: one.run(batch)) for one in (whole, streamed)]  # type: ignore[misc]
    assert found[0] == found[1]
    assert whole.config == streamed.config
    assert (whole.stored_bytes, whole.sizes()) == (streamed.stored_bytes, streamed.sizes())


def test_tied_weights_stay_tied(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    network.model.save_pretrained(tmp_path)
    streamed = open_network(tmp_path, stream=True)
    with torch.no_grad():
        streamed.run(network.batch(1))
    assert loaded(streamed) == ["model.embed_tokens", "lm_head"]
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert "lm_head.weight" not in streamed.sizes()
    assert loaded(streamed) == []
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert torch.equal(streamed.tensor("lm_head.weight"), network.model.model.embed_tokens.weight)


def test_parts_by_hand_are_not_read_when_they_are_called(tiny: Callable[..., Any], folder: Path) -> None:
    streamed, batch = open_network(folder, stream=True), tiny("LlamaForCausalLM").batch(1)
    calls: list[list[str]] = []
    streamed.model.get_submodule("model.layers.1").forward = lambda x, **_: calls.append(loaded(streamed)) or x
    with torch.no_grad():
        streamed.run(batch)
        assert loaded(streamed) == ["lm_head"]
    calls.clear()
    with torch.no_grad(), streamed.by_hand(["model.layers.1"]):
        assert loaded(streamed) == []
        streamed.run(batch)
        streamed.load("model.layers.1")
        streamed.load("model.layers.1")
        assert loaded(streamed) == ["model.layers.1"]
    assert loaded(streamed) == []
    assert calls == [["model.layers.0"]]


def test_memory_beside_blocks_is_counted(folder: Path) -> None:
    streamed = open_network(folder, stream=True)
    norm, table = 32 * 4, 40 * 32 * 4
    assert streamed.resident_bytes == norm + table
    assert open_network(folder).resident_bytes > 5 * streamed.resident_bytes


@pytest.mark.parametrize("free", [100, 10**9])
def test_a_model_of_more_than_half_of_the_memory_exceeds_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    memory = psutil.virtual_memory()._replace(available=free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert exceeds_memory(folder, torch.device("cpu")) == (free == 100)
    assert not exceeds_memory(folder / "nowhere", torch.device("cpu"))


def test_what_lacks_a_tensor_is_not_streamed_and_neither_is_what_is_quantized_already(
    folder: Path,
) -> None:
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    del places["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(places))
    with pytest.raises(InputError, match=r"cannot be read block by block: it does not store model\.norm\.weight"):
        open_network(folder, stream=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "dither"}}))
    with pytest.raises(InputError, match="only full-precision transformers models can"):
        open_network(folder, stream=True)
