"""Values taken apart into their tensors and the rest, so that tensors travel as plain bytes between processes.

Every statistic, task and solution is a nest of dataclasses, modules, tuples, lists and dicts around tensors. The
tensors are the bulk; what is left is small. A tensor that a nest holds twice (a Gram that is its own cross product, the
Gram that query, key and value share) travels once and is one tensor again on the other side.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """What a tensor's bytes stand for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str  # its type: the other side has it on a device of its own

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """The form of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type)

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def tensor(self, data: UInt8[Tensor, " b"]) -> Tensor:
        """The tensor that the bytes are, on the device where they are."""
        return data.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Slot:
    """Where a tensor was."""

    index: int


def as_bytes(tensor: Tensor) -> UInt8[Tensor, " b"]:
    """The bytes of a tensor, in its own memory where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """The value with a slot in the place of each tensor, and the tensors. The value itself is not changed."""
    tensors: list[Tensor] = []
    places: dict[int, Slot] = {}

    def slot(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) not in places:
            places[id(item)] = Slot(len(tensors))
            tensors.append(item)
        return places[id(item)]

    return _rebuilt(value, slot), tensors


def put_together(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `take_apart`."""
    return _rebuilt(value, lambda item: tensors[item.index] if isinstance(item, Slot) else item)


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nest with other leaves; a part that is held twice is one part again."""
    done: dict[int, Any] = {}

    def rebuild(item: Any) -> Any:
        if id(item) not in done:
            done[id(item)] = _with_parts(item, rebuild) if _is_nest(item) else change(item)
        return done[id(item)]

    return rebuild(value)


def _is_nest(item: Any) -> bool:
    if isinstance(item, Slot | Form | type):
        return False
    return is_dataclass(item) or isinstance(item, nn.Module) or type(item) in (list, tuple, dict)


def _with_parts(item: Any, rebuild: Callable[[Any], Any]) -> Any:
    if isinstance(item, dict):
        return {key: rebuild(part) for key, part in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(rebuild(part) for part in item)
    twin = copy.copy(item)
    if isinstance(item, nn.Module):  # such as the quantizer of an input; parameters are not sent about
        for name in ("_buffers", "_modules"):
            twin.__dict__[name] = rebuild(item.__dict__[name])
        return twin
    for name, part in _fields(item):
        object.__setattr__(twin, name, rebuild(part))  # frozen or not: the twin is nobody else's yet
    return twin


def _fields(item: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(item, field.name)) for field in fields(item))
