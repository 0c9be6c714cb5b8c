"""gptq: checkpoints as GPTQModel and AutoGPTQ write them, which vLLM, SGLang, ExLlama and others open.

A weight [o, i] is stored as `qweight` (the stream of codes of each output, along the inputs), `qzeros` (zero-points of
each group, along the outputs), `scales` [groups, o] and `g_idx` [i], the group of each input.

Version 1, which every program reads, holds each zero-point less one: 0x77777777 for symmetric 4-bit codes. A zero-point
of 0 has no place there, so weights that use one are refused; version 2 (`gptq-v2`) holds zero-points themselves, but
programs older than it read it wrongly without a word.

Source: the checkpoint format of AutoGPTQ and GPTQModel (`checkpoint_format` `gptq` and `gptq_v2`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dither.errors import InputError
from dither.export.compressed_tensors import words
from dither.export.folder import (
    cast,
    check_tensors,
    chosen_dtype,
    own_names,
    read_back,
    write_config,
    write_folder,
)
from dither.export.integers import IntegerWeight, integer_weight, refused
from dither.export.source import Source, skeleton
from dither.export.written import Written, scale_bound
from dither.models.checkpoint import Checkpoint
from dither.storage import write_json

TARGET = "gptq"
BITS = (2, 3, 4, 8)
MULTIPLE = 32  # inputs and outputs: the kernels read whole words along both axes
SETTINGS = "quantize_config.json"


@dataclass(frozen=True)
class Setting:
    """How a layer is stored; a group size of -1 is one scale a row, as the format writes it."""

    bits: int
    group_size: int
    sym: bool


def write(source: Source, folder: Path, dtype: str) -> Written:
    """Write version 1, with zero-points less one.

    Raises:
        SpecError, InputError: the format cannot hold the network; nothing is written then.
    """
    return _write(source, folder, dtype, shift=1)


def write_v2(source: Source, folder: Path, dtype: str) -> Written:
    """Write version 2, with zero-points as they are; raises as `write`."""
    return _write(source, folder, dtype, shift=0)


def _write(source: Source, folder: Path, dtype: str, shift: int) -> Written:
    model, kind = skeleton(source), chosen_dtype(source, "float16" if dtype == "auto" else dtype)
    if kind != torch.float16:
        raise InputError(f"gptq holds scales in float16, got {dtype}; leave --dtype out")
    check_tensors(source, model)
    settings = {name: _setting(source, name, model, shift) for name in source.layers}
    named = own_names(model, [f"{name}.weight" for name in settings])
    modules = {name: named[f"{name}.weight"].removesuffix(".weight") for name in settings}
    kept = own_names(model, list(source.kept_names))
    files = write_folder(folder, _tensors(source, modules, kept, shift), source)
    config = configuration(settings, modules, _left(model, source), shift)
    write_json(config, folder / SETTINGS)
    files += [SETTINGS, write_config(source, folder, kind, config)]
    tensors = read_back(folder, files)
    return Written(
        files, kind, lambda name: read_weight(tensors, modules[name], settings[name].bits, shift),
        lambda name: tensors.read(kept[name]), lambda name: scale_bound(_integers(source, name), kind),
        "vLLM, SGLang, GPTQModel, or transformers with gptqmodel installed", _notes(shift),
    )  # fmt: skip


def _notes(shift: int) -> list[str]:
    return [] if shift else ["version 2: programs that do not know it read wrong zero-points and write gibberish"]


def _integers(source: Source, name: str) -> IntegerWeight:
    return integer_weight(name, source.weight(name), TARGET, BITS)


def _setting(source: Source, name: str, model: nn.Module, shift: int) -> Setting:
    entry = source.layers[name]
    if not isinstance(model.get_submodule(name), nn.Linear):
        raise refused(name, TARGET, f"a {type(model.get_submodule(name)).__name__}: it has linear layers only")
    if entry["activations"] is not None:
        raise refused(name, TARGET, "quantized activations")
    if any(size % MULTIPLE for size in entry["shape"]):
        shape = "×".join(map(str, entry["shape"]))
        raise refused(name, TARGET, f"a weight of {shape}: its kernels need multiples of {MULTIPLE} on both axes")
    weight = _integers(source, name)
    if shift and bool((weight.zero_point < 1).any()):
        raise refused(name, "version 1 of gptq", "a zero-point of 0, which it stores less one (gptq-v2 can)")
    return Setting(weight.bits, weight.group_size or -1, weight.symmetric)


def _left(model: nn.Module, source: Source) -> list[str]:
    """Linear layers beside quantized ones that are kept, by their names in files; the head is kept anyway."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left = [f"{n}.weight" for n in names if n not in source.layers and model.get_submodule(n) is not head]
    return [name.removesuffix(".weight") for name in own_names(model, left).values()]


def configuration(
    settings: Mapping[str, Setting], modules: Mapping[str, str], left: list[str], shift: int
) -> dict[str, Any]:
    """`quantization_config`: the most frequent setting, and by `dynamic` what differs from it."""
    usual = Counter(settings.values()).most_common(1)[0][0]
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in left}
    for name, one in settings.items():
        if one != usual:
            dynamic[f"+:^{re.escape(modules[name])}$"] = {
                "bits": one.bits,
                "group_size": one.group_size,
                "sym": one.sym,
            }
    return {
        "quant_method": TARGET,
        "bits": usual.bits,
        "group_size": usual.group_size,
        "desc_act": False,
        "sym": usual.sym,
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in settings),
        "pack_dtype": "int32",
        "checkpoint_format": "gptq" if shift else "gptq_v2",
        "meta": {"quantizer": ["dither"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _tensors(
    source: Source, modules: Mapping[str, str], kept: Mapping[str, str], shift: int
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source.kept():
        yield kept[name], cast(name, tensor, torch.float16)
    for name, module in modules.items():
        for part, tensor in packed(name, _integers(source, name), shift).items():
            yield f"{module}.{part}", tensor


def packed(name: str, weight: IntegerWeight, shift: int) -> dict[str, Tensor]:
    """The tensors of a layer's weight by their short names; zero-points are stored less `shift`."""
    columns = weight.codes.shape[1]
    zeros = (weight.zero_point.T - shift).to(torch.uint8)
    return {
        "qweight": words(weight.codes, weight.bits).T,
        "qzeros": words(zeros, weight.bits),
        "scales": cast(f"{name} scale", weight.scale.T, torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (weight.group_size or columns),
    }


def read_weight(tensors: Checkpoint, name: str, bits: int, shift: int) -> Float[np.ndarray, "o i"]:
    """The weight decoded from the file with numpy alone, from the format's definition: scale * (code - zero)."""
    groups, scale = tensors.read(f"{name}.g_idx").numpy(), tensors.read(f"{name}.scales").float().numpy()
    codes = _fields(tensors.read(f"{name}.qweight").numpy().T, bits, len(groups)).T
    zeros = _fields(tensors.read(f"{name}.qzeros").numpy(), bits, scale.shape[1]) + shift
    result: Float[np.ndarray, "o i"] = (scale[groups] * (codes - zeros[groups]).astype(np.float32)).T
    return result


def _fields(stored: Int[np.ndarray, "r w"], bits: int, count: int) -> Int[np.ndarray, "r n"]:
    """Fields of a row of words read as one large number, its first word the lowest."""
    first = np.arange(count) * bits
    low = np.ascontiguousarray(stored).view(np.uint32).astype(np.uint64)
    low = np.concatenate([low, np.zeros_like(low[:, :1])], axis=1)
    pairs = low[:, first // 32] | low[:, first // 32 + 1] << np.uint64(32)
    fields: Int[np.ndarray, "r n"] = (pairs >> (first % 32).astype(np.uint64) & np.uint64(2**bits - 1)).astype(np.int64)
    return fields
