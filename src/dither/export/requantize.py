"""requantize: a model that is quantized already in another scheme, without data, compared with what it came from."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float

from dither.errors import InputError, StorageError
from dither.export.graph import Graph
from dither.export.quantized_graph import activations, layers, read_model
from dither.export.requantize_onnx import (
    RANGE,
    Parts,
    Pixels,
    Progress,
    check_target,
    input_range,
    pictures_like_nature,
    requantized,
)
from dither.export.sessions import open_session
from dither.formats.spec import QuantSpec
from dither.requantization import Settings, requantize_result
from dither.storage import writing

DRAWN = 32  # pictures on which means and differences are measured


def requantize(
    model: str | Path,
    to: str,
    output: str | Path,
    *,
    correct_weights: bool = True,
    fold_errors: bool = True,
    unsigned: bool = True,
    pixels: Pixels | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a quantized model in a symmetric scheme such as int8:channel or int8:tensor:pow2.

    The model is an ONNX file in the QDQ form, and `output` one; or a folder that dither wrote, and `output` another.

    Activations that are never negative stay unsigned unless `unsigned` is off. `pixels` are what the model takes
    [n, c, h, w], to measure means on; without, pictures with the spectrum of natural ones are drawn.

    Raises:
        PathError, InputError, SpecError: there is no such model, it is not quantized, a node or the target is unknown.
        StorageError: writing failed, or what was read back differs.
    """
    source, file = Path(model), Path(output)
    spec = QuantSpec.parse(to)
    check_target(spec)
    if source.is_dir():
        settings = Settings(spec, correct_weights, fold_errors, unsigned)
        return requantize_result(source, file, settings, lambda shape: _of_shape(shape, pixels), progress)
    original = read_model(source)
    if file.exists() or file.suffix != ".onnx":
        raise InputError(f"expected a new file ending in .onnx as output, got {str(file)!r}")
    drawn = pixels if pixels is not None else _drawn(original, source.name)
    changed, remarks = requantized(original, spec, drawn, Parts(correct_weights, fold_errors, unsigned), progress)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(changed, str(file))
    compared = _compare(original, read_back(file, changed), drawn)
    return {
        "schema": 1,
        "kind": "requantization",
        "source": source.name,
        "to": str(spec),
        "output": str(file),
        "size_bytes": file.stat().st_size,
        "source_size_bytes": source.stat().st_size,
        "layers": len(list(layers(Graph(changed.graph)))),
        "activations": len(list(activations(Graph(changed.graph)))),
        "notes": remarks,
        **compared,
    }


def _of_shape(shape: tuple[int, ...], pixels: Pixels | None) -> Float[torch.Tensor, "b c h w"]:
    channels, height, width = shape
    drawn = pictures_like_nature((DRAWN, channels, height, width), *RANGE) if pixels is None else pixels
    return torch.from_numpy(drawn)


def _drawn(model: onnx.ModelProto, name: str) -> Pixels:
    """Pictures for a model that takes one tensor of them."""
    sizes = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    if len(model.graph.input) != 1 or len(sizes) != 4 or not all(sizes[1:]):
        raise InputError(f"{name}: expected one input of pictures [batch, channels, height, width], got {sizes}")
    shape = (DRAWN, sizes[1], sizes[2], sizes[3])
    return pictures_like_nature(shape, *input_range(model))


def read_back(file: Path, expected: onnx.ModelProto) -> onnx.ModelProto:
    """The model as it is in the file.

    Raises:
        StorageError: it is another than was written.
    """
    found = onnx.load(str(file))
    if found.SerializeToString(deterministic=True) != expected.SerializeToString(deterministic=True):
        raise StorageError(f"{file.name} was read back different")
    return found


def _compare(source: onnx.ModelProto, target: onnx.ModelProto, pixels: Pixels) -> dict[str, Any]:
    """How far the target's outputs are from the source's on the pictures."""
    true, found = (answers(model, pixels) for model in (source, target))
    difference = np.sqrt(np.square(found - true).mean() / max(float(true.var()), 1e-30))
    same = (found.argmax(axis=-1) == true.argmax(axis=-1)).mean()
    return {"pictures": len(pixels), "difference": float(difference), "agreement": float(same)}


def answers(model: onnx.ModelProto, pixels: Pixels) -> Float[np.ndarray, "n ..."]:
    """The first output of a model, in float64."""
    session = open_session(model)
    name = model.graph.input[0].name
    parts = [session.run(None, {name: pixels[k : k + 100]})[0] for k in range(0, len(pixels), 100)]
    return np.concatenate(parts).astype(np.float64)
