"""Pictures through an export and through dither's own network: how often both give the same answer."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dither.data import ImageSet, class_ids, load_processor, open_images
from dither.data.processing import FILE_NAME
from dither.errors import InputError
from dither.evaluation.fidelity import agreement, top1
from dither.export.source import Source
from dither.export.written import Written

BATCH = 64


def compare_answers(source: Source, written: Written, to: str, data: str | Path) -> dict[str, Any]:
    """Agreement, the largest difference of logits, and the accuracy of both where the pictures have labels.

    Raises:
        InputError: the export cannot be run here, or no image processor is known.
        PathError: there are no such pictures.
    """
    if written.logits is None:
        raise InputError(f"--data compares the answers of an export to onnx-qdq; {to} is not run here")
    pictures, batches = open_pictures(source, data)
    found, true = (torch.cat(part) for part in zip(*_both(written, batches), strict=True))
    names = {str(name): int(number) for name, number in dict(source.config.get("label2id", {})).items()}
    ids = None if pictures.labels is None else class_ids(pictures.labels, names)
    return {
        "source": pictures.source,
        "count": len(found),
        "agreement": agreement(true, found),
        "largest_difference": float((found - true).abs().max()),
        "top1": None if ids is None else top1(found, ids),
        "simulated_top1": None if ids is None else top1(true, ids),
    }


def open_pictures(
    source: Source, data: str | Path, count: int | None = None
) -> tuple[ImageSet, Iterator[Float[Tensor, "b c h w"]]]:
    """Pictures, at most `count` drawn ones, and batches of them as the network is given them.

    Raises:
        InputError: no image processor is known.
        PathError: there are no such pictures.
    """
    pictures = open_images(data)
    pictures = pictures if count is None else pictures.sample(min(count, len(pictures)), seed=0)
    place = next((place for place in source.folders if (place / FILE_NAME).is_file()), None)
    if place is None:
        raise InputError(f"{source.name}: no {FILE_NAME} says how its pictures are made; put it beside config.json")
    channels = int(source.config.get("num_channels", 3))
    return pictures, pictures.pixel_batches(load_processor(place), BATCH, expect_channels=channels)


def _both(written: Written, batches: Iterable[torch.Tensor]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for pixels in batches:
        if written.logits is not None:
            found, true = written.logits(pixels)
            yield torch.from_numpy(found), torch.from_numpy(true)
