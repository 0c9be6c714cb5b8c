"""Networks from memory and folders: how they are called, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dither.errors import InputError, PathError, StorageError
from dither.models.network import Network, first_names, load_state, open_network


def test_a_batch_is_a_tensor_a_tuple_of_arguments_or_named_ones() -> None:
    network = Network(nn.Bilinear(2, 2, 1), "two")
    x = torch.ones(1, 2)
    assert torch.equal(network.run((x, x)), network.run({"input1": x, "input2": x}))
    assert Network(nn.Identity(), "one").run(x) is x


def test_a_cache_of_keys_and_values_is_off_unless_the_batch_asks_for_it(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    run = Network(network.model, "llama").run
    assert run(network.batch(1)).past_key_values is None
    assert run(network.batch(1)["input_ids"]).past_key_values is None
    assert run({**network.batch(1), "use_cache": True}).past_key_values is not None
    assert network.model.config.use_cache


def test_a_missing_folder_and_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"model folder '.*nowhere' does not exist"):
        open_network(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is not a model folder: it has no config\.json"):
        open_network(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        open_network(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"names no model_type \(transformers\) or architecture \(timm\)"):
        open_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(InputError, match="cannot read it"):
        open_network(tmp_path)


def test_weights_that_are_missing_or_damaged_are_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny()
    network.model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    with pytest.raises(InputError, match="cannot be loaded as ViTForImageClassification"):
        open_network(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded as ViTForImageClassification"):
        open_network(tmp_path)


def test_a_folder_opens_as_the_class_it_names(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny()
    network.model.save_pretrained(tmp_path)
    opened = open_network(tmp_path)
    assert type(opened.model) is type(network.model)
    assert not opened.model.training
    assert torch.equal(network.logits(network.batch(2), opened.model), network.logits(network.batch(2)))
    assert opened.channels == 3


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight


def test_a_tied_weight_is_loaded_from_its_first_name() -> None:
    model = Tied()
    names = first_names(model)
    assert names["two.weight"] == "one.weight"
    assert names["two.bias"] == "two.bias"
    state = {name: torch.full_like(x, 2.0) for name, x in model.state_dict().items() if names[name] == name}
    load_state(model, state, "the file")
    assert bool((model.two.weight == 2).all())
    with pytest.raises(StorageError, match="the file does not fit Tied"):
        load_state(model, {**state, "three": torch.ones(1)}, "the file")
    del state["other.weight"]
    with pytest.raises(StorageError, match="the file does not fit Tied"):
        load_state(model, state, "the file")
