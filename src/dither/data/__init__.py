"""Reading what a network is calibrated and evaluated on."""

from dither.data.images import ImageSet, class_ids, open_images
from dither.data.processing import DefaultProcessor, ImageProcessor, default_processor, load_processor

__all__ = [
    "DefaultProcessor",
    "ImageProcessor",
    "ImageSet",
    "class_ids",
    "default_processor",
    "load_processor",
    "open_images",
]
