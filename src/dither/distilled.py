"""Calibration without data: pictures that a network's own batch normalizations describe, and how they are shown."""

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dither.data.calibration import Calibration, prepare_calibration
from dither.data.processing import pixel_values
from dither.errors import InputError
from dither.models.distil import Distillation, Distilled, distil
from dither.models.network import Network

DISTILLED = "distilled"  # what a user writes in place of a path
_SHOWN, _ACROSS, _POINTS = 16, 8, 100


def calibration_without_data(
    network: Network,
    settings: Distillation,
    count: int | None,
    seed: int,
    batch_size: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Calibration, dict[str, Any]]:
    """Batches of distilled pictures, and facts about them for the report; empty where they are only noise.

    Raises:
        InputError: the network has no batch normalization, or does not tell the size of its pictures.
    """
    settings = settings if count is None else settings.model_copy(update={"count": count})
    size = picture_size(network)
    steps = settings.steps

    def say(step: int) -> None:
        if progress is not None:
            progress("distilling pictures", step, steps)

    found = distil(network.model, network.run, size, settings, seed, network.device, say)
    batches = list(found.pictures.split(batch_size))
    data = prepare_calibration(batches, None, size[0], None, seed, batch_size, network.device)
    source = "distilled from batch normalizations" if steps else "noise; nothing is measured on it"
    return replace(data, source=source), facts(found, settings) if steps else {}


def picture_size(network: Network) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a network takes.

    Raises:
        InputError: neither a processor nor the configuration says.
    """
    if network.processor is not None:
        blank = Image.new("L" if network.channels == 1 else "RGB", (64, 64))
        channels, height, width = pixel_values(network.processor, [blank], network.channels).shape[1:]
        return int(channels), int(height), int(width)
    size = network.config.get("image_size")
    if isinstance(size, int):
        return network.channels, size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return network.channels, int(size[0]), int(size[1])
    raise InputError(
        f"{network.name} does not say how large its pictures are: give its folder a preprocessor_config.json, "
        "or calibrate on data"
    )


def facts(found: Distilled, settings: Distillation) -> dict[str, Any]:
    """What a report shows: the loss over the steps, what is left of it by norm, and some of the pictures."""
    stride = max(1, len(found.losses) // _POINTS)
    steps = sorted({*range(0, len(found.losses), stride), len(found.losses) - 1})
    return {
        "settings": settings.model_dump(mode="json"),
        "loss": [{"step": step, "loss": found.losses[step]} for step in steps],
        "gaps": found.gaps,
        "time_s": found.time_s,
        "pictures": picture_sheet(found.pictures),
    }


def picture_sheet(pictures: Float[Tensor, "n c h w"]) -> str:
    """The first pictures side by side as a PNG in base64, each stretched from its 1st to its 99th percentile."""
    shown = pictures[:_SHOWN].detach().float().cpu()
    low, high = (torch.quantile(shown.flatten(1), q, dim=1).view(-1, 1, 1, 1) for q in (0.01, 0.99))
    bright = ((shown - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    bright = bright[:, :3] if bright.shape[1] >= 3 else bright[:, :1].expand(-1, 3, -1, -1)
    blank = bright.new_ones(-len(bright) % min(_ACROSS, len(bright)), *bright.shape[1:])
    across = min(_ACROSS, len(bright))
    sheet = torch.cat([bright, blank]).unflatten(0, (-1, across)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    file = io.BytesIO()
    Image.fromarray((255 * sheet.numpy()).round().astype(np.uint8)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
