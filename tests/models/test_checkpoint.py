"""Tensors in files: found by name over shards, read one at a time, refused where something is missing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dither.errors import StorageError
from dither.models.checkpoint import INDEX, Checkpoint, Place


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with an index."""
    save_file({"a": torch.arange(6.0).bfloat16().reshape(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.tensor([7])}, tmp_path / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def test_a_tensor_is_read_from_its_shard_in_the_dtype_asked_for(sharded: Path) -> None:
    checkpoint = Checkpoint.of_folder(sharded)
    assert checkpoint.read("a").dtype == torch.bfloat16
    assert torch.equal(checkpoint.read("a", torch.float32), torch.arange(6.0).reshape(2, 3))
    assert torch.equal(checkpoint.read("b"), torch.tensor([7]))
    assert set(checkpoint.read_all()) == {"a", "b"}
    assert checkpoint.elements() == 7
    assert checkpoint.nbytes == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))


def test_one_file_is_read_without_an_index_and_goes_before_one(sharded: Path) -> None:
    save_file({"c": torch.ones(1)}, sharded / "model.safetensors")
    assert set(Checkpoint.of_folder(sharded).places) == {"c"}


def test_what_is_read_can_be_changed_without_changing_the_file(sharded: Path) -> None:
    checkpoint = Checkpoint.of_folder(sharded)
    checkpoint.read("b").zero_()
    assert torch.equal(checkpoint.read("b"), torch.tensor([7]))


def test_a_part_is_exchanged_by_its_prefix_and_names_can_be_changed(sharded: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.of_folder(sharded).renamed({"one.x": "a", "one.y": "b", "oneself": "b"})
    save_file({"one.x": torch.zeros(1)}, tmp_path / "changed.safetensors")
    changed = checkpoint.with_part("one.", Checkpoint.of_files([tmp_path / "changed.safetensors"]))
    assert torch.equal(changed.read("one.x"), torch.zeros(1))
    assert torch.equal(changed.read("oneself"), torch.tensor([7]))
    assert set(changed.places) == {"one.x", "oneself"}
    assert torch.equal(checkpoint.read("one.y"), torch.tensor([7]))


def test_matrices_stored_as_one_are_read_alone_turned_and_joined(tmp_path: Path) -> None:
    path, stack = tmp_path / "stack.safetensors", torch.arange(24.0).reshape(2, 3, 4)
    save_file({"stack": stack}, path)
    second, turned = Place(path, "stack", 1), Place(path, "stack", 0, transposed=True)
    checkpoint = Checkpoint({"second": (second,), "turned": (turned,), "both": (Place(path, "stack", 0), second)})
    assert torch.equal(checkpoint.read("second"), stack[1])
    assert torch.equal(checkpoint.read("turned", torch.float16), stack[0].T.half())
    assert checkpoint.read("turned").stride() == (1, 4)  # as the model itself sees it, so that products are the same
    assert torch.equal(checkpoint.read("both"), stack.reshape(6, 4))


def test_what_is_missing_or_damaged_is_named(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"model\.safetensors' cannot be read"):
        Checkpoint.of_folder(tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"tensor c is missing in .*00001-of-00002"):
        Checkpoint.of_folder(sharded).read("c")
    (sharded / "model-00002-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(StorageError, match=r"00002-of-00002\.safetensors' cannot be read"):
        Checkpoint.of_folder(sharded).read("b")
    for text in ("{", "[]", '{"weight_map": 3}'):
        (sharded / INDEX).write_text(text)
        with pytest.raises(StorageError, match=r"index\.json' cannot be read"):
            Checkpoint.of_folder(sharded)
