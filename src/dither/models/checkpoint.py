"""Tensors that lie in safetensors files: one file, or shards with an index, read one tensor at a time.

A file is open only while a tensor is read, so that nothing of it stays mapped into memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dither.errors import StorageError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Place(NamedTuple):
    """Where a tensor is stored: the file and its name there; or one of the matrices that are stored there as one."""

    path: Path
    name: str
    part: int | None = None
    transposed: bool = False


class Checkpoint:
    """Tensors by name, each with its place, or with several whose rows come one after the other."""

    def __init__(self, places: Mapping[str, tuple[Place, ...]]) -> None:
        """`places` says where each tensor is stored."""
        self.places = dict(places)

    @classmethod
    def of_folder(cls, folder: Path) -> "Checkpoint":
        """The tensors of `model.safetensors`, else of the shards that `model.safetensors.index.json` names.

        Raises:
            StorageError: there is neither, or they cannot be read.
        """
        if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
            return cls.of_files([folder / WEIGHTS])
        try:
            found = json.loads((folder / INDEX).read_text())["weight_map"]
            return cls({str(name): (Place(folder / Path(file).name, str(name)),) for name, file in found.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{str(folder / INDEX)!r} cannot be read: {error}") from None

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> "Checkpoint":
        """All tensors of some files.

        Raises:
            StorageError: one of them cannot be read.
        """
        places: dict[str, tuple[Place, ...]] = {}
        for path in paths:
            with _opened(path) as file:
                places |= {name: (Place(path, name),) for name in file.keys()}
        return cls(places)

    def renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """The tensors that `names` lists as new name → name here."""
        return Checkpoint({new: self.places[old] for new, old in names.items()})

    def with_part(self, prefix: str, other: "Checkpoint") -> "Checkpoint":
        """This checkpoint with the tensors of `other` instead of all whose names begin with `prefix`."""
        kept = {name: place for name, place in self.places.items() if not name.startswith(prefix)}
        return Checkpoint(kept | other.places)

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """One tensor in memory of its own, in `dtype` (None: as stored).

        Raises:
            StorageError: it is not there, or its file cannot be read.
        """
        if name not in self.places:
            raise StorageError(f"tensor {name} is missing in {', '.join(repr(str(path)) for path in self.paths[:2])}")
        parts = [_read(place, dtype, device) for place in self.places[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor, as stored."""
        return {name: self.read(name) for name in self.places}

    def elements(self) -> int:
        """Numbers in all tensors together, as the headers of the files tell.

        Raises:
            StorageError: a file cannot be read.
        """
        count = 0
        for path in self.paths:
            with _opened(path) as file:
                count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
        return count

    @property
    def paths(self) -> list[Path]:
        """The files, each once."""
        return list(dict.fromkeys(place.path for places in self.places.values() for place in places))

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.paths)


def _read(place: Place, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
    with _opened(place.path) as file:
        try:
            whole = place.part is None
            stored: Tensor = file.get_tensor(place.name) if whole else file.get_slice(place.name)[place.part]
        except SafetensorError as error:
            raise StorageError(f"{str(place.path)!r}: tensor {place.name} cannot be read: {error}") from None
        read = stored.to(device, dtype or stored.dtype, copy=True)
    return read.T if place.transposed else read


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error}") from None
    with file:
        yield file
