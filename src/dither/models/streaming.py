"""Weights that stay in files until a part of the model is used, for models that are larger than memory.

The model stands on the meta device. Its *parts* are the repeated blocks, and the large tables and layers outside of
them. A part is read when it is called, and dropped as soon as another one is needed: one part is in memory at a time.
What lies outside of parts (norms, position tables, buffers) is small and stays.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dither.errors import StorageError
from dither.models.anatomy import block_names
from dither.models.checkpoint import Checkpoint
from dither.models.layers import is_layer

LARGE = 2**25  # bytes from which a table or layer outside of blocks is worth reading again and again
SHARE = 0.5  # of the free memory that weights may take; beside them are copies of a block, Grams and activations


class Streamed:
    """The weights of a model whose parts come from files."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: str | torch.device = "cpu") -> None:
        """`model` is on the meta device, but for buffers that are not stored; `checkpoint` has its state by name."""
        self.model, self.checkpoint, self.device = model, checkpoint, torch.device(device)
        self.parts = part_names(model)
        self.read_s = 0.0  # spent on reading parts
        self._current: str | None = None
        self._by_hand: frozenset[str] = frozenset()
        self._empty: dict[str, Tensor] = {}  # what stands for a tensor of this name while it is in no memory
        self._homes: dict[int, list[tuple[nn.Module, str]]] = {}  # where that stands: more than once if it is tied
        self._known = [(_tensor(module, key), module, key) for module, key, _ in _slots(model, "")]  # so do their ids
        for tensor, module, key in self._known:
            self._homes.setdefault(id(tensor), []).append((module, key))
        self._hooked: dict[str, nn.Module] = {}
        self._fill(slot for slot in _slots(model, "") if not any(_inside(slot[2], part) for part in self.parts))
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[key] = buffer.to(self.device)
        for part in self.parts:
            self._hook(part)

    @property
    def resident_bytes(self) -> int:
        """Bytes of what stays in memory, and of the largest part outside of blocks."""
        stays: int = sum(x.nbytes for x in self.model.state_dict().values() if x.device.type != "meta")
        blocks = set(block_names(self.model))
        outside = [_bytes(self.model.get_submodule(part)) for part in self.parts if part not in blocks]
        return stays + max(outside, default=0)

    def load(self, part: str) -> None:
        """Bring a part into memory, and drop the one before; what is no part is there already."""
        if self._current == part:
            return
        self.release()
        if part not in self.parts:
            return
        started, self._current = perf_counter(), part
        self._fill(_slots(self.model.get_submodule(part), part))
        self.read_s += perf_counter() - started

    def release(self) -> None:
        """Drop the part that is in memory; its tensors are on the meta device again."""
        if self._current is None:
            return
        for module, key, name in _slots(self.model.get_submodule(self._current), self._current):
            tensor = _tensor(module, key)
            if tensor.device.type != "meta":
                empty = self._empty.get(name)
                if empty is None or (empty.shape, empty.dtype) != (tensor.shape, tensor.dtype):
                    empty = _like(tensor, torch.empty_like(tensor, device="meta"))
                self._exchange(module, key, tensor, empty)
        self._current = None

    def _exchange(self, module: nn.Module, key: str, old: Tensor, new: Tensor) -> None:
        """Put `new` where `old` is: here, and wherever else it is tied to."""
        homes = self._homes.get(id(old)) or self._homes.get(id(new)) or []
        for holder, name in [(module, key), *homes]:
            if (holder._parameters | holder._buffers).get(name) is old:
                (holder._buffers if name in holder._buffers else holder._parameters)[name] = new  # type: ignore[assignment]

    def load_holder(self, name: str) -> None:
        """Bring the part into memory that a module or tensor of this name belongs to, if it belongs to one."""
        part = next((part for part in self.parts if _inside(name, part)), None)
        if part is not None:
            self.load(part)

    def read(self, name: str) -> Tensor:
        """A tensor of the model's state, wherever it is."""
        here = state_tensor(self.model, name)
        return here if here.device.type != "meta" else self.checkpoint.read(name, here.dtype)

    def stored(self, part: str, checkpoint: Checkpoint) -> None:
        """From now on a part comes from where its changed tensors were written to."""
        if part not in self.parts:
            return
        self.checkpoint = self.checkpoint.with_part(f"{part}.", checkpoint)
        if self._hooked.get(part) is not self.model.get_submodule(part):  # a layer that was replaced
            self._hook(part)

    @contextmanager
    def by_hand(self, parts: Sequence[str]) -> Iterator[None]:
        """While open, these parts are not read when they are called; whoever calls them does it."""
        self.release()
        before, self._by_hand = self._by_hand, frozenset(parts)
        try:
            yield
        finally:
            self._by_hand = before
            self.release()

    def _hook(self, part: str) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            if part not in self._by_hand:
                self.load(part)

        module = self.model.get_submodule(part)
        module.register_forward_pre_hook(enter)
        self._hooked[part] = module

    def _fill(self, slots: Iterator[tuple[nn.Module, str, str]]) -> None:
        for module, key, name in list(slots):
            empty = _tensor(module, key)
            if empty.device.type == "meta":
                self._empty[name] = empty
                self._exchange(module, key, empty, _like(empty, self.checkpoint.read(name, empty.dtype, self.device)))


def state_tensor(model: nn.Module, name: str) -> Tensor:
    """The tensor that a name of the model's state stands for."""
    holder, _, key = name.rpartition(".")
    return _tensor(model.get_submodule(holder), key).detach()


def exceeds_memory(folder: Path, device: torch.device, copies: int = 1) -> bool:
    """Whether a folder's model, in float32, is too large to be held in memory while it is quantized.

    `copies` processes of this machine hold one each; every one has its own GPU.
    """
    try:
        size = 4 * Checkpoint.of_folder(folder).elements()
    except StorageError:  # whoever opens the folder says what is wrong
        return False
    free = psutil.virtual_memory().available / copies
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return bool(size > SHARE * free)


def part_names(model: nn.Module) -> list[str]:
    """Blocks, and layers and embeddings of `LARGE` bytes or more outside of them."""
    blocks = block_names(model)
    outside = [
        name
        for name, module in model.named_modules()
        if (is_layer(module) or isinstance(module, nn.Embedding))
        and _bytes(module) >= LARGE
        and not any(_inside(name, block) for block in blocks)
    ]
    return blocks + outside


def _slots(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Every tensor of a module's state as (holder, key, full name)."""
    for name, holder in module.named_modules(prefix=prefix, remove_duplicate=False):
        stored = [key for key in holder._buffers if key not in holder._non_persistent_buffers_set]
        for key in [*holder._parameters, *stored]:
            if (holder._parameters | holder._buffers)[key] is not None:
                yield holder, key, f"{name}.{key}" if name else key


def _tensor(module: nn.Module, key: str) -> Tensor:
    tensor = module._parameters.get(key)
    return module.get_buffer(key) if tensor is None else tensor


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter if the old tensor is one."""
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in module.state_dict().values())


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")
