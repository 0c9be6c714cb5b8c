"""Writing a quantized network as a folder, and checking what was written with an independent reader.

The reader shares no decoding with the writer: it decodes the file's bits with numpy from the structure that goes into
config.json.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dither.errors import StorageError
from dither.formats.spec import QuantSpec
from dither.models.network import CONFIG, WEIGHTS, Network, first_names
from dither.models.structure import describe
from dither.nn.linear import QuantizedConv2d, QuantizedLinear

BESIDE = (  # what a model's folder holds that quantization does not change
    "preprocessor_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn failures to write into one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write {str(what)!r}: {error}") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            partial.touch()
            mode = partial.stat().st_mode  # what the umask allows; save_file would leave it to the owner alone
            save_file(_apart(tensors), partial, metadata)
            partial.chmod(mode)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none in the memory of another, which safetensors refuses."""
    parts: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        x = tensor.detach().cpu().contiguous()
        place = x.untyped_storage().data_ptr()
        parts[name] = x.clone() if place in seen else x
        seen.add(place)
    return parts


def write_text(text: str, path: Path) -> None:
    """A text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            partial.write_text(text)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(data: Any, path: Path) -> None:
    """JSON, keys in the order given, with one final newline."""
    write_text(json.dumps(data, indent=1) + "\n", path)


def write_network(network: Network, folder: Path) -> None:
    """Tensors and processor; the tensors are read back; last config.json, whose presence says the network is whole.

    Raises:
        StorageError: writing failed, or what was read back differs.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    config = network.config | {"quantization_config": {"quant_method": "dither", **describe(network.model)}}
    if not {"model_type", "architecture"} & set(config):
        config["class"] = type(network.model).__name__
    elif "model_type" in config:
        config["architectures"] = [type(network.model).__name__]
    config.pop("_name_or_path", None)
    write_tensors(_unshared(network.model), folder / WEIGHTS, {"format": "pt"})
    if network.source is not None:
        copy_beside(network.source, folder)
    verify(network.model, folder / WEIGHTS, config["quantization_config"])
    write_json(config, folder / CONFIG)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy processor, tokenizer and generation settings, those that there are."""
    for name in BESIDE:
        if (source / name).is_file():
            with writing(folder / name):
                shutil.copyfile(source / name, folder / name)


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state without second names of one tensor, which safetensors refuses and loading ties again."""
    state, first = model.state_dict(), first_names(model)
    return {name: x for name, x in state.items() if first[name] == name}


def verify(model: nn.Module, path: Path, structure: Mapping[str, Any]) -> None:
    """Decode every weight of the file with numpy and compare it with the network in memory.

    Raises:
        StorageError: a tensor is missing or differs; the message names it.
    """
    state = _unshared(model)
    with writing(path), safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(state):
            raise StorageError(f"{str(path)!r} does not hold what was written: {sorted(names ^ set(state))[:3]}")
        for name in names:
            if not torch.equal(file.get_tensor(name), state[name].cpu()):
                raise StorageError(f"{str(path)!r}: tensor {name} was read back different")
        for name, entry in structure["layers"].items():
            parts = {
                key: file.get_tensor(f"{name}.packed.{key}")
                for key in ("codes", "scale", "zero_point", "column_set")
                if f"{name}.packed.{key}" in names
            }
            layer = model.get_submodule(name)
            if not isinstance(layer, QuantizedLinear | QuantizedConv2d):
                raise StorageError(f"{name} is a {type(layer).__name__} in memory, but a quantized layer in the file")
            expected = layer.packed.qtensor().dequantize().cpu().numpy()
            if not np.array_equal(decode(parts, QuantSpec(**entry["weights"]), tuple(entry["shape"])), expected):
                raise StorageError(f"{str(path)!r}: weight {name} decodes to other values than in memory")


def decode(parts: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> Float[np.ndarray, "o i"]:
    """The float32 weight [o, i] of stored parts, from the format's definition alone."""
    rows, columns = shape
    codes = _stream(parts["codes"], spec.bits, columns).astype(np.float32)
    scale = parts["scale"].float().numpy()
    if spec.symmetry == "unsigned":
        zero = np.zeros_like(scale)
    elif spec.symmetry == "sym":
        zero = np.full_like(scale, 2 ** (spec.bits - 1) if spec.bits > 1 else 0.5)
    elif parts["zero_point"].dtype == torch.uint8:
        zero = _stream(parts["zero_point"], spec.bits, scale.shape[1]).astype(np.float32)
    else:
        zero = parts["zero_point"].float().numpy()
    row = np.arange(rows) * scale.shape[0] // rows
    column = np.arange(columns) * scale.shape[1] // columns
    if spec.dual:
        column = _stream(parts["column_set"][None], 1, columns)[0]
    where = np.ix_(row, column)
    result: Float[np.ndarray, "o i"] = scale[where] * (codes - zero[where])
    return result


def _stream(packed: Tensor, bits: int, count: int) -> Int[np.ndarray, "r n"]:
    stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : count * bits]
    weights = (1 << np.arange(bits)).astype(np.int64)
    values: Int[np.ndarray, "r n"] = stream.reshape(len(packed), count, bits).astype(np.int64) @ weights
    return values
