"""gguf: one file for llama.cpp and the programs built on it, with dither's own codes in its simple block formats.

A block is 32 columns of a row: Q4_0 holds symmetric 4-bit codes and a scale, Q4_1 asymmetric ones with a scale and the
minimum (−scale · zero-point, rounded to float16), Q8_0 symmetric 8-bit ones. Groups of 64 or 128 columns, or one scale
a row, are written as blocks that repeat their scale. Everything else is stored in 16 bits, vectors in 32.

Source: ggml's block formats and the GGUF metadata of llama.cpp's own converter, through the `gguf` package.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dither.errors import InputError
from dither.export.folder import cast, check_tensors, chosen_dtype
from dither.export.gguf_settings import ARCHITECTURES, ROPE, rope_factors, write_settings, write_vocabulary
from dither.export.gguf_tokenizer import read_vocabulary
from dither.export.integers import IntegerWeight, integer_weight, refused
from dither.export.source import Source, skeleton
from dither.export.written import Written, scale_bound
from dither.storage import writing

TARGET = "gguf"
BLOCK = 32
_TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}  # (bits, symmetric) → block format
_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # of the file as a whole: that of most layers
_KEPT = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write(source: Source, folder: Path, dtype: str) -> Written:
    """Write the file.

    Raises:
        SpecError, InputError: the format cannot hold the network; nothing is written then.
    """
    kind_of_model = source.config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind_of_model))
    if architecture is None:
        raise InputError(f"gguf: expected one of the model types {', '.join(ARCHITECTURES)}, got {kind_of_model}")
    check_tensors(source, skeleton(source))
    kept = chosen_dtype(source, "float16" if dtype == "auto" else dtype)
    types = {name: block_type(name, _integers(source, name), source.layers[name]) for name in source.layers}
    usual = Counter(types.values()).most_common(1)[0][0]
    file = File(source, folder / f"{source.name}-{usual}.gguf", types, _names(source, architecture), kept)
    vocabulary = read_vocabulary(source)
    with writing(file.path):
        folder.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(file.path, architecture)
        write_settings(writer, source, _FILE_TYPES[usual])
        write_vocabulary(writer, vocabulary)
        file.write_tensors(writer)
        writer.close()
    reader = gguf.GGUFReader(file.path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return Written(
        [file.path.name], kept, lambda name: file.read(tensors, f"{name}.weight"),
        lambda name: file.read_kept(tensors, name), file.bound,
        "llama.cpp and what is built on it, or transformers with gguf_file=", vocabulary.notes,
    )  # fmt: skip


def _integers(source: Source, name: str) -> IntegerWeight:
    return integer_weight(name, source.weight(name), TARGET, (4, 8))


def block_type(name: str, weight: IntegerWeight, entry: Mapping[str, Any]) -> str:
    """The block format of a layer.

    Raises:
        SpecError: there is none.
    """
    columns, size = weight.codes.shape[1], weight.group_size
    if entry["activations"] is not None:
        raise refused(name, TARGET, "quantized activations")
    if columns % BLOCK or (size is not None and size % BLOCK):
        raise refused(name, TARGET, f"groups of {size or columns} columns: its blocks are {BLOCK}")
    if (weight.bits, weight.symmetric) not in _TYPES:
        raise refused(name, TARGET, f"{weight.bits}-bit codes with zero-points: int8 has to be sym")
    return _TYPES[weight.bits, weight.symmetric]


def blocks(weight: IntegerWeight, kind: str) -> UInt8[Tensor, "o bytes"]:
    """The bytes of each row: for each block its scale (and minimum) and its codes.

    Four bits put column j of a block into the low half of byte j and column j + 16 into the high half.
    """
    cells = weight.grouped(BLOCK)
    scale = cast("scale", cells.scale, torch.float16)
    codes = cells.codes.unflatten(1, (-1, BLOCK))
    parts = [scale[..., None].view(torch.uint8)]
    if kind == "Q4_1":
        minimum = cast("minimum", -cells.scale * cells.zero_point, torch.float16)
        parts.append(minimum[..., None].view(torch.uint8))
    if kind == "Q8_0":
        parts.append((codes.to(torch.int16) - 128).to(torch.int8).view(torch.uint8))
    else:
        parts.append(codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4)
    return torch.cat(parts, dim=2).flatten(1)


@dataclass(frozen=True)
class File:
    """The tensors of a file: the block format of each layer, and the name of each tensor there."""

    source: Source
    path: Path
    types: Mapping[str, str]
    names: Mapping[str, str]
    kept: torch.dtype

    def heads(self, name: str) -> int | None:
        """Heads of a tensor whose rows the file has in another order: llama's query and key, halves interleaved."""
        config = self.source.config
        if ARCHITECTURES[config["model_type"]] != "llama":
            return None
        owner = name.rpartition(".")[0].rpartition(".")[2]
        return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(owner)

    def ordered(self, name: str, x: Tensor) -> Tensor:
        """Rows in the order of the file."""
        heads = self.heads(name)
        return x if heads is None else x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()

    def write_tensors(self, writer: Any) -> None:
        """Announce all tensors, then write them one by one; each is computed only when its bytes are written."""
        for name, data, kind in self._kept():
            writer.add_tensor_info(self.names[name], data.shape, data.dtype, data.nbytes, kind)
        for name, text in self.types.items():
            kind = gguf.GGMLQuantizationType[text]
            size, nbytes = gguf.GGML_QUANT_SIZES[kind]
            rows, columns = self.source.layers[name]["shape"]
            shape = (rows, columns // size * nbytes)
            writer.add_tensor_info(self.names[f"{name}.weight"], shape, np.dtype(np.uint8), rows * shape[1], kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, data, _ in self._kept():
            writer.write_tensor_data(data)
        for name, text in self.types.items():
            stored = blocks(_integers(self.source, name), text)
            writer.write_tensor_data(self.ordered(f"{name}.weight", stored).numpy())

    def _kept(self) -> Iterator[tuple[str, np.ndarray[Any, Any], Any]]:
        for name, tensor in self.source.kept():
            dtype = torch.float32 if tensor.ndim == 1 else self.kept
            data = cast(name, self.ordered(name, tensor), dtype)
            raw = data.view(torch.uint8) if dtype == torch.bfloat16 else data
            yield name, raw.numpy(), getattr(gguf.GGMLQuantizationType, _KEPT[dtype])
        factors = rope_factors(self.source.config)
        if factors is not None:
            yield ROPE, factors, gguf.GGMLQuantizationType.F32

    def read(self, tensors: Mapping[str, Any], name: str) -> Float[np.ndarray, "o ..."]:
        """A matrix or vector as the `gguf` package decodes it, its rows in the order of transformers again."""
        found = tensors[self.names[name]]
        values = np.asarray(gguf.quants.dequantize(found.data, found.tensor_type))
        heads = self.heads(name)
        if heads is None:
            return values
        return np.swapaxes(values.reshape(heads, -1, 2, *values.shape[1:]), 1, 2).reshape(values.shape)

    def read_kept(self, tensors: Mapping[str, Any], name: str) -> Tensor:
        """A tensor that was kept, in the type it has in the file."""
        dtype = torch.float32 if len(tensors[self.names[name]].shape) == 1 else self.kept
        return torch.from_numpy(self.read(tensors, name).copy()).to(dtype)

    def bound(self, name: str) -> Float[np.ndarray, "o i"]:
        """How far rounding scales, and the minimum of Q4_1, to float16 moves values."""
        weight = _integers(self.source, name)
        bound = scale_bound(weight, torch.float16)
        if self.types[name] == "Q4_1":
            minimum = (weight.scale * weight.zero_point).double() * 2.0**-11 + 2.0**-25  # half a step of float16
            column = torch.arange(weight.codes.shape[1]) // (weight.group_size or weight.codes.shape[1])
            bound = bound + minimum[:, column].numpy()
        return bound


def _names(source: Source, architecture: str) -> dict[str, str]:
    """The name in the file of each tensor that is stored.

    Raises:
        InputError: the format has no name for one.
    """
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(known, int(source.config["num_hidden_layers"]))
    names = {ROPE: ROPE}
    for name in [*source.kept_names, *(f"{name}.weight" for name in source.layers)]:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{name}: a {architecture} file has no such tensor; export --to dequantized")
        names[name] = found
    return names
