"""Folders on disk: read back by an independent reader, whole or not looking finished, with clear errors."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dither
from dither import storage
from dither.errors import InputError, StorageError
from dither.models.network import open_network
from dither.models.structure import describe
from dither.storage import verify, write_network, write_tensors


@pytest.fixture
def result(odd: Callable[..., Any]) -> dither.Result:
    network = odd(depth=1)
    return dither.quantize(network.model, "erq", network.batch(3))


def tamper(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor], Path], None]) -> None:
    """Let every written tensor file be changed behind the writer's back."""

    def saved(tensors: dict[str, Tensor], path: Path, metadata: Any = None) -> None:
        save_file(tensors, path, metadata)
        change(tensors, path)

    monkeypatch.setattr(storage, "save_file", saved)


def flip_last_bit(tensors: dict[str, Tensor], path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_one(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(dict(list(tensors.items())[1:]), path, {"format": "pt"})


def cut_short(tensors: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_last_bit, "was read back different"),
        (drop_one, "does not hold what was written"),
        (cut_short, "incomplete"),
    ],
)
def test_a_file_that_differs_from_the_network_is_an_error_and_no_model(
    result: dither.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    tamper(monkeypatch, change)
    with pytest.raises(StorageError, match=message):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(InputError, match="is not a model folder"):
        open_network(tmp_path / "out")


def test_a_format_that_is_written_down_wrong_is_noticed(result: dither.Result, tmp_path: Path) -> None:
    write_network(result.network, tmp_path)
    structure = describe(result.model)
    verify(result.network, tmp_path, structure)
    structure["layers"]["stem"]["weights"]["symmetry"] = "sym"
    with pytest.raises(StorageError, match="weight stem decodes to other values than in memory"):
        verify(result.network, tmp_path, structure)


def test_the_configuration_is_written_last(
    result: dither.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data: Any, path: Path) -> None:
        assert (path.parent / "model.safetensors").exists()
        raise StorageError(f"cannot write {path.name}")

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(StorageError, match="config.json"):  # noqa: RUF043
        write_network(result.network, tmp_path / "out")
    with pytest.raises(InputError, match="it has no config"):
        dither.load(tmp_path / "out")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_that_looks_finished(
    result: dither.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match=r"cannot write '.*model\.safetensors': .*No space left"):
        result.save(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_that_cannot_be_made_is_one_clear_error(result: dither.Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here already")
    with pytest.raises(StorageError, match="cannot write"):
        result.save(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="is a file; choose a folder"):
        result.save(tmp_path / "file")
    with pytest.raises(InputError, match="is not empty"):
        result.save(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_umask_gives(result: dither.Result, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_network(result.network, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors"], 0o666 & ~umask)


class Shared(nn.Module):
    """A table under two names, and buffers that are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(6, 2)
        self.again = nn.Embedding(6, 4)
        self.again.weight = self.table.weight
        line = torch.arange(6.0)
        self.register_buffer("start", line[:4])
        self.register_buffer("end", line[2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.head(self.table(x) + self.again(x) + self.start + self.end))


def test_tied_weights_and_views_are_stored_and_come_back(tmp_path: Path) -> None:
    model, x = Shared().eval(), torch.tensor([[1, 2, 5]])
    result = dither.quantize(model, "rtn", [x])
    write_network(result.network, tmp_path)
    assert "again.weight" not in load_file(tmp_path / "model.safetensors")
    again = dither.load(tmp_path, into=Shared())
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    assert again.again.weight is again.table.weight  # type: ignore[union-attr]


def test_the_folder_says_what_it_is(result: dither.Result, tmp_path: Path) -> None:
    result.save(tmp_path / "out")
    names = {"config.json", "model.safetensors", "recipe.yaml", "provenance.json", "report.json", "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["class"] == "Mlp"
    assert config["quantization_config"]["quant_method"] == "dither"
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert {"dither", "torch", "model_sha256", "seed", "calibration"} <= set(provenance)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(result.report.data))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors({"a": torch.ones(2)}, path)

    def broken(tensors: Any, where: Path, metadata: Any = None) -> None:
        where.write_bytes(b"half")
        raise OSError("gone")

    monkeypatch.setattr(storage, "save_file", broken)
    with pytest.raises(StorageError, match="gone"):
        write_tensors({"a": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
