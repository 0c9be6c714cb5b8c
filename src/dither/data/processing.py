"""From pictures to pixel values: a model's own image processor, or a plain one for a model that has none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dither.errors import InputError, PathError

FILE_NAME = "preprocessor_config.json"


@runtime_checkable
class ImageProcessor(Protocol):
    """The part of a Hugging Face image processor that dither calls."""

    def __call__(self, images: Any, *, return_tensors: str) -> Mapping[str, Any]:
        """`images` as a batch; `pixel_values` holds it."""


@dataclass(frozen=True)
class DefaultProcessor:
    """Resize to `size` (height, width) by Pillow's bilinear filter, scale to 0..1, subtract `mean`, divide by `std`."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, images: Sequence[Image.Image], *, return_tensors: str = "pt"
    ) -> dict[str, Float[Tensor, "b c h w"]]:
        """A batch of pixel values, gray if there is one mean and RGB if there are three."""
        if return_tensors != "pt":
            raise InputError(f"expected return_tensors='pt', got {return_tensors!r}")
        height, width = self.size
        mode = "L" if len(self.mean) == 1 else "RGB"
        resized = [image.convert(mode).resize((width, height), Image.Resampling.BILINEAR) for image in images]
        pixels = torch.stack([torch.from_numpy(np.array(image, dtype=np.float32)) for image in resized]) / 255
        pixels = pixels.reshape(len(images), height, width, len(self.mean)).permute(0, 3, 1, 2)
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        return {"pixel_values": ((pixels - mean) / std).contiguous()}


def default_processor(size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> DefaultProcessor:
    """The plain processor; one mean and std means gray pictures, three mean RGB."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError(f"expected size of at least 1 pixel, got {size}")
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise InputError(f"expected mean and std of 1 or 3 channels, got {len(mean)} and {len(std)}")
    if not all(value > 0 for value in std):
        raise InputError(f"expected std above 0 in every channel, got {tuple(std)}")
    return DefaultProcessor((height, width), tuple(mean), tuple(std))


def load_processor(folder: str | Path) -> ImageProcessor:
    """The image processor saved with the model in `folder`; nothing is fetched and no code of the folder's is run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PathError(f"expected a model's folder with {FILE_NAME}, got {str(folder)!r}, which is no folder")
    if not (folder / FILE_NAME).is_file():
        raise PathError(
            f"expected {FILE_NAME} in {folder.name!r}, got none; save the model's image processor there "
            "or pass one (dither.data.default_processor)"
        )
    from transformers import AutoImageProcessor  # seconds to import, and language models need none

    try:
        loaded = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(
            f"expected an image processor that transformers knows in {folder.name}/{FILE_NAME}, got: {error}"
        ) from error
    return cast(ImageProcessor, loaded)


def pixel_values(
    processor: ImageProcessor, images: Sequence[Image.Image], channels: int
) -> Float[Tensor, "b {channels} h w"]:
    """Run `processor` on a batch and check that its result is what a model of `channels` input channels takes."""
    try:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"expected an image processor that returns one batch of pixel_values, got: {error}; "
            "it must resize all pictures to one size"
        ) from error
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != len(images):
        got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise InputError(f"expected pixel_values of shape ({len(images)}, channels, height, width), got {got}")
    if pixels.shape[1] != channels:
        raise InputError(
            f"expected pictures with {channels} channels, which the model takes, got {pixels.shape[1]} "
            "from the image processor; use the processor that belongs to the model"
        )
    return pixels.to(torch.float32)
