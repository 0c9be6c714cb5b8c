"""Reading what a network is calibrated and evaluated on."""

from pathlib import Path

from dither.data.images import ImageSet, class_ids, open_images
from dither.data.processing import DefaultProcessor, ImageProcessor, default_processor, load_processor
from dither.data.text import TextSet, is_text, open_text

__all__ = [
    "DataSet",
    "DefaultProcessor",
    "ImageProcessor",
    "ImageSet",
    "TextSet",
    "class_ids",
    "default_processor",
    "load_processor",
    "open_data",
    "open_images",
    "open_text",
]

DataSet = ImageSet | TextSet


def open_data(path: str | Path) -> DataSet:
    """Pictures or text, whichever the path holds.

    Raises:
        PathError, InputError: it holds neither, or cannot be read.
    """
    return open_text(path) if is_text(path) else open_images(path)
