"""Activations that wait for their turn, moved to disk when they exceed a budget.

A tensor is parked by writing its storage to a file and shrinking the storage to nothing; whoever holds the tensor (the
suspended forward pass does) keeps holding it, and finds its values again after it was fetched.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Spill:
    """Keeps parked tensors in memory up to `budget` bytes and the rest in files of a temporary folder."""

    def __init__(self, budget: int, protected: Iterable[Tensor] = ()) -> None:
        """`protected` are tensors that must stay (parameters); storages shared with them are never parked.

        They are not kept alive: what replaces a parameter frees its memory.
        """
        self.budget, self.in_memory, self.spilled = budget, 0, 0
        self._protected = {tensor.untyped_storage().data_ptr(): ref(tensor) for tensor in protected}
        self._parked: dict[int, tuple[Tensor, Path | None, int]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def park(self, value: Any) -> None:
        """Count the tensors of a nest and write them out where the budget is used up."""
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            key = storage._cdata  # names the storage while we hold a tensor on it
            if key in self._parked or self._is_protected(storage.data_ptr()) or not storage.nbytes():
                continue
            size, path = storage.nbytes(), None
            if self.in_memory + size > self.budget:
                path = self._write(tensor)
            else:
                self.in_memory += size
            self._parked[key] = (tensor, path, size)

    def _is_protected(self, address: int) -> bool:
        known = self._protected.get(address)
        alive = None if known is None else known()
        return alive is not None and alive.untyped_storage().data_ptr() == address  # else another took its place

    def fetch(self, value: Any) -> None:
        """Bring back what `park` put away and stop counting it."""
        for tensor in tensors_in(value):
            entry = self._parked.pop(tensor.untyped_storage()._cdata, None)
            if entry is None:
                continue
            _, path, size = entry
            if path is None:
                self.in_memory -= size
                continue
            tensor.untyped_storage().resize_(size)
            bytes_of(tensor).copy_(load_file(path)["bytes"])
            path.unlink()

    def _write(self, tensor: Tensor) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dither-activations-")
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        save_file({"bytes": bytes_of(tensor).cpu().clone()}, path)
        tensor.untyped_storage().resize_(0)
        self.spilled += 1
        return path

    def __enter__(self) -> "Spill":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def bytes_of(tensor: Tensor) -> Tensor:
    """All that a tensor's storage holds, in its memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors with storages of their own, in a nest of tuples, lists and dicts; one of several views stands for all."""
    found: dict[int, Tensor] = {}
    queue = [value]
    while queue:
        item = queue.pop(0)
        if isinstance(item, Tensor):
            found.setdefault(item.untyped_storage()._cdata, item)
        elif isinstance(item, dict):
            queue += list(item.values())
        elif isinstance(item, list | tuple):
            queue += list(item)
    return list(found.values())
