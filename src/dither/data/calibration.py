"""Calibration data: what a user gives, as batches that a network can be called on."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dither.data import ImageSet, TextSet, open_data
from dither.data.processing import ImageProcessor, pixel_values
from dither.errors import InputError

COUNT = 32  # pictures; what ERQ and RepQ-ViT use
SEQUENCES = 128  # of text, as the GPTQ paper draws them
LENGTH = 512  # tokens of a sequence
TOKENS = 2048  # of text in a batch; measured: 4,096 take a third more memory, and no less time on a CPU


@dataclass(frozen=True)
class Calibration:
    """Batches and where they came from; `sha256` is over the numbers that the network is called on."""

    batches: tuple[Any, ...]
    count: int
    source: str
    sha256: str


def one_sample(batch: Any) -> tuple[Any, int]:
    """The first sample of a batch, as a batch, and how many there are; the batch itself where that is not plain."""
    parts = list(batch.values()) if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    sizes = {len(part) if isinstance(part, Tensor) and part.ndim else 0 for part in parts}
    if len(sizes) != 1 or 0 in sizes:
        return batch, 1
    if isinstance(batch, dict):
        return {key: part[:1] for key, part in batch.items()}, sizes.pop()
    return tuple(part[:1] for part in parts) if isinstance(batch, tuple | list) else batch[:1], sizes.pop()


def is_drawn(data: Any) -> bool:
    """Whether samples of it are drawn, by a seed; else they are the same whatever the seed."""
    return isinstance(data, TextSet | ImageSet)


def prepare_calibration(
    data: Any,
    processor: ImageProcessor | None,
    channels: int,
    count: int | None,
    seed: int,
    batch_size: int,
    device: torch.device,
    tokenizer: Any | None = None,
    length: int = LENGTH,
) -> Calibration:
    """Batches on `device` from a path, a data set, PIL pictures, a tensor of inputs or an iterable of ready batches.

    From a path or a data set `count` pictures (None: 32) or sequences of `length` tokens (None: 128) are drawn by
    `seed`; all where there are fewer.

    Raises:
        InputError: fewer than asked for, no processor for pictures or tokenizer for text, or nothing at all.
    """
    if isinstance(data, str | Path):
        data = open_data(data)
    if isinstance(data, TextSet):
        if tokenizer is None:
            raise InputError("text needs a tokenizer: use a model folder that has one, or pass batches of input_ids")
        windows = data.sample(tokenizer, length, count, seed, SEQUENCES)
        parts = windows.split(max(1, min(batch_size, TOKENS // length)))
        return _calibration([{"input_ids": part} for part in parts], len(windows), data.source, device)
    if isinstance(data, ImageSet):
        chosen = data.sample(min(COUNT, len(data)) if count is None else count, seed)
        if processor is None:
            raise InputError("pictures need an image processor: use a model folder that has one, or pass tensors")
        batches = list(chosen.pixel_batches(processor, batch_size, expect_channels=channels))
        return _calibration(batches, len(chosen), data.source, device)
    if isinstance(data, Tensor):
        return _calibration(list(_limited(data, count).split(batch_size)), len(_limited(data, count)), "tensor", device)
    items = list(data) if isinstance(data, Iterable) else []
    if items and all(isinstance(item, Image.Image) for item in items):
        if processor is None:
            raise InputError("pictures need an image processor: use a model folder that has one, or pass tensors")
        pixels = pixel_values(processor, _limited(items, count), channels)
        return _calibration(list(pixels.split(batch_size)), len(pixels), "pictures", device)
    if not items:
        raise InputError(f"calibration needs a path, pictures, a tensor or batches; got {type(data).__name__}, empty")
    return _calibration(items, sum(_rows(item) for item in items), "batches", device)


def _limited(data: Any, count: int | None) -> Any:
    if count is not None and count > len(data):
        raise InputError(f"calibration of {count} was asked for, but there are only {len(data)}")
    return data if count is None else data[:count]


def _calibration(batches: Sequence[Any], count: int, source: str, device: torch.device) -> Calibration:
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in _tensors(batch):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    moved = tuple(_to(batch, device) for batch in batches)
    return Calibration(moved, count, source, digest.hexdigest())


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to(part, device) for key, part in batch.items()}
    return type(batch)(_to(part, device) for part in batch) if isinstance(batch, list | tuple) else batch


def _rows(batch: Any) -> int:
    tensors = _tensors(batch)
    return int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 0
