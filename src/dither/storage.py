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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dither.decode import decode
from dither.errors import StorageError
from dither.models.checkpoint import INDEX, WEIGHTS, Checkpoint
from dither.models.network import CONFIG, Network
from dither.models.structure import describe, read_layout
from dither.nn.linear import QuantizedConv2d, QuantizedLinear

BESIDE = (  # what a model's folder holds that quantization does not change
    "preprocessor_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
SHARD_BYTES = 2 * 10**9  # of a file of weights, which is in memory while it is written
_PRODUCT = 1e-5  # of the largest weight: two libraries may sum a product of two factors in another order


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
    _write_shards(network, folder)
    if network.source is not None:
        copy_beside(network.source, folder)
    verify(network, folder, config["quantization_config"])
    write_json(config, folder / CONFIG)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy processor, tokenizer and generation settings, those that there are."""
    for name in BESIDE:
        if (source / name).is_file():
            with writing(folder / name):
                shutil.copyfile(source / name, folder / name)


def _write_shards(network: Network, folder: Path) -> None:
    """`model.safetensors`, or several files and their index where one would be larger than `SHARD_BYTES`."""
    sizes = network.sizes()
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[held] for held in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors({name: network.tensor(name) for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if count > 1:
        write_json({"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}, folder / INDEX)


def verify(network: Network, folder: Path, structure: Mapping[str, Any]) -> None:
    """Decode every weight of the folder with numpy and compare it with the network, one at a time.

    Raises:
        StorageError: a tensor is missing or differs; the message names it.
    """
    stored, names = Checkpoint.of_folder(folder), set(network.sizes())
    if set(stored.places) != names:
        differing = sorted(set(stored.places) ^ names)[:3]
        raise StorageError(f"{str(folder)!r} does not hold what was written: {differing}")
    for name in stored.places:
        if not torch.equal(stored.read(name), network.tensor(name).cpu()):
            raise StorageError(f"{str(stored.places[name][0].path)!r}: tensor {name} was read back different")
    for name, entry in structure["layers"].items():
        parts = {
            key: stored.read(f"{name}.packed.{key}")
            for key in read_layout(entry).tensors()
            if f"{name}.packed.{key}" in names
        }
        layer = network.module(name)
        if not isinstance(layer, QuantizedLinear | QuantizedConv2d):
            raise StorageError(f"{name} is a {type(layer).__name__} in memory, but a quantized layer in the file")
        expected = layer.packed.qtensor().dequantize().cpu().numpy()
        tolerance = _PRODUCT * float(np.abs(expected).max(initial=0)) if "low_rank" in entry else 0.0
        if not np.allclose(decode(parts, entry), expected, rtol=0, atol=tolerance):
            raise StorageError(f"{str(folder)!r}: weight {name} decodes to other values than in memory")
