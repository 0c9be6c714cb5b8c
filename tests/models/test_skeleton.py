"""Models without weights: what is stored is on the meta device and found in the files, what is computed is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dither.errors import InputError
from dither.models.checkpoint import Checkpoint
from dither.models.network import open_network
from dither.models.skeleton import fitted, skeleton


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "SwinForImageClassification", "BertForSequenceClassification"])
def test_only_buffers_that_are_not_stored_have_values_and_they_are_those_of_the_class(
    tiny: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    tiny(name).model.save_pretrained(tmp_path)
    kind = getattr(transformers, name)
    model, whole = skeleton(kind, tmp_path, torch.float32), open_network(tmp_path).model
    assert {x.device.type for x in model.state_dict().values()} == {"meta"}
    stored = set(whole.state_dict())
    assert set(model.state_dict()) == stored
    for key, buffer in whole.named_buffers():
        if key not in stored:
            assert torch.equal(model.get_buffer(key), buffer)
    assert not model.training


@pytest.mark.parametrize(
    ("name", "prefix"), [("LlamaForCausalLM", "model."), ("BertForSequenceClassification", "bert.")]
)
def test_tensors_are_found_under_the_names_of_the_base_model(
    tiny: Callable[..., Any], tmp_path: Path, name: str, prefix: str
) -> None:
    network = tiny(name)
    network.model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({key.removeprefix(prefix): x for key, x in load_file(file).items()}, file, {"format": "pt"})
    model = skeleton(type(network.model), tmp_path, torch.float32)
    checkpoint = fitted(Checkpoint.of_folder(tmp_path), model, "the folder")
    for key, x in network.model.state_dict().items():
        assert torch.equal(checkpoint.read(key), x)


def test_tied_weights_share_a_place_and_different_values_for_them_are_refused(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    network = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    network.model.save_pretrained(tmp_path)
    kind, file = type(network.model), tmp_path / "model.safetensors"
    checkpoint = fitted(Checkpoint.of_folder(tmp_path), skeleton(kind, tmp_path, torch.float32), "it")
    assert checkpoint.places["lm_head.weight"] == checkpoint.places["model.embed_tokens.weight"]
    state = load_file(file)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"different values for .* which the model ties"):
        fitted(Checkpoint.of_folder(tmp_path), skeleton(kind, tmp_path, torch.float32), "it")


def test_a_tensor_that_is_not_stored_as_the_model_holds_it_is_named(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("LlamaForCausalLM")
    network.model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["model.norm.weight"]
    save_file(state, file, {"format": "pt"})
    model = skeleton(type(network.model), tmp_path, torch.float32)
    with pytest.raises(InputError, match=r"it does not store model\.norm\.weight as LlamaForCausalLM holds it"):
        fitted(Checkpoint.of_folder(tmp_path), model, "it")
