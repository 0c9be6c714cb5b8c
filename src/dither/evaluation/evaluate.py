"""evaluate: top-1 where there are labels, and fidelity to the full-precision model, which needs none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.data import ImageSet, class_ids, open_images
from dither.errors import InputError
from dither.evaluation import Evaluation, evaluate_classifier, predict
from dither.models.network import Network, open_network
from dither.nn.linear import cache_weights

Progress = Callable[[int], None]
BATCH = 64


def evaluate(
    model: str | Path | nn.Module | Network,
    data: str | Path | ImageSet,
    *,
    reference: str | Path | nn.Module | Network | Float[Tensor, "n classes"] | None = None,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a classifier over pictures; `reference` is the full-precision model, or its logits on the same pictures.

    `count` evaluates on the pictures drawn with `seed` instead of all.

    Raises:
        PathError, InputError: the model or the pictures cannot be read, labels do not fit the model's classes, or
            there are neither labels nor a reference.
    """
    pictures = select(data, count, seed)
    if pictures.labels is None and reference is None:
        raise InputError(f"{pictures.source!r} has no labels: give a reference model to compare with, or labels")
    network = _network(model, device)
    if reference is not None and not isinstance(reference, Tensor):
        reference = logits(_network(reference, device), pictures, batch_size, progress)
    cache_weights(network.model)
    try:
        return evaluate_classifier(
            network.model,
            pictures.pixel_batches(need_processor(network), batch_size, expect_channels=network.channels),
            reference=reference,
            class_ids=ids(network, pictures),
            device=network.device,
            source=pictures.source,
            progress=progress,
        )
    finally:
        cache_weights(network.model, cached=False)


def logits(
    network: Network, pictures: ImageSet, batch_size: int = BATCH, progress: Progress | None = None
) -> Float[Tensor, "n classes"]:
    """What a network answers to all pictures, float32 on the CPU."""
    batches = pictures.pixel_batches(need_processor(network), batch_size, expect_channels=network.channels)
    return predict(network.model, batches, network.device, progress)


def select(data: str | Path | ImageSet, count: int | None, seed: int = 0) -> ImageSet:
    """The pictures to evaluate on."""
    pictures = data if isinstance(data, ImageSet) else open_images(data)
    return pictures if count is None else pictures.sample(count, seed)


def refuse_overlap(calibration: ImageSet, pictures: ImageSet) -> None:
    """Evaluating on what a method was calibrated on flatters it.

    Raises:
        InputError: a picture is in both sets.
    """
    shared = calibration.digests() & pictures.digests()
    if shared:
        raise InputError(
            f"{len(shared)} pictures are in both calibration {calibration.source!r} and evaluation "
            f"{pictures.source!r}; give two sets that do not overlap"
        )


def ids(network: Network, pictures: ImageSet) -> tuple[int, ...] | None:
    """The model's class number of each picture, or None where the pictures have no labels."""
    return None if pictures.labels is None else tuple(class_ids(pictures.labels, network.label2id))


def need_processor(network: Network) -> Any:
    """The network's image processor.

    Raises:
        InputError: it has none.
    """
    if network.processor is None:
        raise InputError(f"{network.name} has no image processor (preprocessor_config.json); add one to its folder")
    return network.processor


def _network(model: str | Path | nn.Module | Network, device: str | torch.device | None) -> Network:
    if isinstance(model, Network):
        return model
    if isinstance(model, nn.Module):
        return open_network(model)
    return open_network(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
