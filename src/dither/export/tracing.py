"""A network as one ONNX graph from pictures or tokens to logits: what it is traced with, and running it again."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.data.processing import FILE_NAME, load_processor
from dither.errors import InputError
from dither.export.source import Source
from dither.storage import writing

FILE, OPSET = "model.onnx", 21
ONE_FILE = 1.5e9  # bytes; a single ONNX file cannot grow beyond 2 GiB


def example(source: Source, model: nn.Module, dtype: torch.dtype, count: int = 2) -> dict[str, Tensor]:
    """Random inputs to trace and compare with.

    Raises:
        InputError: the model reads neither tokens nor pictures, or nothing tells the size of its pictures.
    """
    generator, config = torch.Generator().manual_seed(0), source.config
    name = str(model.main_input_name)
    if name == "input_ids":
        length = min(int(config.get("max_position_embeddings", 16)) - 1, 16)
        return {name: torch.randint(0, int(config["vocab_size"]), (count, length), generator=generator)}
    if name == "pixel_values":
        shape = (count, int(config.get("num_channels", 3)), *_picture_size(source))
        return {name: torch.randn(shape, generator=generator).to(dtype)}
    raise InputError(f"onnx: {type(model).__name__} reads {name}; models that read tokens or pictures can be exported")


def _picture_size(source: Source) -> tuple[int, int]:
    """Height and width that the image processor makes, or else those of the configuration."""
    place = next((place for place in source.folders if (place / FILE_NAME).is_file()), None)
    if place is not None:
        from PIL import Image

        pixels: Tensor = load_processor(place)(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
        return pixels.shape[-2], pixels.shape[-1]
    size = source.config.get("image_size")
    if size is None:
        raise InputError(f"{source.name}: the size of its pictures is unknown; put its {FILE_NAME} beside config.json")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class _Logits(nn.Module):
    """The network as a function of one tensor."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.options = {"use_cache": False} if name == "input_ids" else {}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(**{self.name: x}, **self.options).logits
        return logits


def trace(model: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write the graph of a network into a folder; returns the files that are there then.

    Names of its parameters begin with `model.`; the batch is free, and the length of a text.
    """
    (name, x), dimension = next(iter(inputs.items())), torch.export.Dim
    axes = {0: dimension.DYNAMIC, 1: dimension.DYNAMIC} if name == "input_ids" else {0: dimension.DYNAMIC}
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            _Logits(model, name).eval(), (x,), dynamo=True, dynamic_shapes=(axes,), opset_version=OPSET,
            input_names=[name], output_names=["logits"], verbose=False,
        )  # fmt: skip
    size = sum(x.nbytes for x in model.state_dict().values())
    with writing(folder / FILE):
        folder.mkdir(parents=True, exist_ok=True)
        program.save(str(folder / FILE), external_data=size > ONE_FILE)
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about its own packages while it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run_graph(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> Float[np.ndarray, "..."]:
    """The logits that ONNX Runtime computes."""
    return np.asarray(session.run(["logits"], {name: x.numpy() for name, x in inputs.items()})[0])
