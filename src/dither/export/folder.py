"""A model folder as transformers and what follows it read it: tensors in shards, configuration, tokenizer files."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import InputError
from dither.export.source import Source
from dither.models.checkpoint import INDEX, WEIGHTS, Checkpoint
from dither.models.layers import is_layer, matrix_shape
from dither.models.network import CONFIG
from dither.storage import BESIDE, SHARD_BYTES, write_json, write_tensors, writing

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def chosen_dtype(source: Source, name: str) -> torch.dtype:
    """The type of scales and kept tensors; `auto` is that of the stored scales, so that nothing is rounded again.

    Raises:
        InputError: an unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
        return DTYPES[name]
    stored = {entry["weights"].get("scale_dtype", "float16") for entry in source.layers.values()}
    return torch.bfloat16 if stored == {"bfloat16"} else torch.float16


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in another type, others as they are.

    Raises:
        InputError: a value does not fit; the message names the tensor.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(result).all()):
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name}: {float(tensor.abs().max()):.3g} does not fit into {kind}; export with --dtype bfloat16"
        )
    return result


def check_tensors(source: Source, model: nn.Module) -> None:
    """Refuse results whose tensors the plain architecture has no place for: created biases, quantized activations.

    Raises:
        InputError: the message names the module and what to do.
    """
    instead = "open the folder with from_pretrained after `import dither`"
    if source.structure["attention"]:
        owner = next(iter(source.structure["attention"]))
        raise InputError(f"{owner}: other programs do not quantize the operands of attention; {instead}")
    if source.structure.get("experts"):
        raise InputError(f"{source.structure['experts'][0]}: experts taken apart cannot be exported yet; {instead}")
    for name, entry in source.layers.items():
        layer = model.get_submodule(name)
        if is_layer(layer) and tuple(entry["shape"]) != matrix_shape(layer):
            raise InputError(f"{name}: channels were pruned, which other programs do not expect; {instead}")
    known = set(model.state_dict())
    for name in source.kept_names:
        if name not in known:
            raise InputError(f"{name}: {type(model).__name__} has no such tensor; {instead}")


def checkpoint_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The name in files of each tensor of the model: transformers renames modules of some architectures on loading.

    Tensors that are a part of one in files, or hold several, are left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found, state = {}, model.state_dict()
    for name in names:
        reverted = revert_weight_conversion(model, {name: state[name]})  # type: ignore[arg-type]
        if len(reverted) == 1 and next(iter(reverted.values())).shape == state[name].shape:
            found[name] = next(iter(reverted))
    return found


def own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """As `checkpoint_names`, of all tensors.

    Raises:
        InputError: one is left out; the message names it.
    """
    listed = list(names)
    found = checkpoint_names(model, listed)
    for name in listed:
        if name not in found:
            raise InputError(f"{name} is stored in parts by {type(model).__name__}; export --to dequantized")
    return found


def write_folder(folder: Path, tensors: Iterable[tuple[str, Tensor]], source: Source) -> list[str]:
    """Write tensors in shards and the files that go with them; returns what was written. config.json comes last."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    parts, sizes, part, total = list[str](), dict[str, int](), dict[str, Tensor](), 0
    for name, tensor in tensors:
        if part and sum(x.nbytes for x in part.values()) + tensor.nbytes > SHARD_BYTES:
            parts.append(_write_part(folder, len(parts), part))
            part = {}
        part[name] = tensor
        sizes[name] = len(parts)
        total += tensor.nbytes
    parts.append(_write_part(folder, len(parts), part))
    names = [WEIGHTS] if len(parts) == 1 else [_shard_name(k, len(parts)) for k in range(len(parts))]
    for old, new in zip(parts, names, strict=True):
        with writing(folder / new):
            (folder / old).replace(folder / new)
    if len(parts) > 1:
        listed = {name: names[k] for name, k in sizes.items()}
        write_json({"metadata": {"total_size": total}, "weight_map": listed}, folder / INDEX)
        names.append(INDEX)
    return names + copy_companions(source, folder)


def _write_part(folder: Path, number: int, part: Mapping[str, Tensor]) -> str:
    name = f"part-{number:05d}.safetensors"
    write_tensors(part, folder / name, {"format": "pt"})
    return name


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def copy_companions(source: Source, folder: Path) -> list[str]:
    """Copy tokenizer, generation settings and processors, each from the nearest folder that has it."""
    copied = []
    for name in BESIDE:
        place = next((place / name for place in source.folders if (place / name).is_file()), None)
        if place is not None:
            with writing(folder / name):
                shutil.copyfile(place, folder / name)
            copied.append(name)
    return copied


def write_config(source: Source, folder: Path, dtype: torch.dtype, quantization: Mapping[str, Any] | None) -> str:
    """config.json, which both generations of transformers read: new and old names of type and rope settings."""
    kind = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in source.config.items() if key not in ("_name_or_path", "quantization_config")}
    config |= {"dtype": kind, "torch_dtype": kind}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if untied(source, config):
        config["tie_word_embeddings"] = False  # the head has codes of its own now
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(config, folder / CONFIG)
    return CONFIG


def untied(source: Source, config: Mapping[str, Any]) -> bool:
    """Whether an output layer that was tied to the embeddings has been quantized, and so no longer is."""
    names = {name.rpartition(".")[2] for name in source.layers}
    return bool(config.get("tie_word_embeddings")) and bool(names & {"lm_head", "embed_out"})


def read_back(folder: Path, files: Iterable[str]) -> Checkpoint:
    """The tensors of the files that were just written.

    Raises:
        StorageError: they cannot be read.
    """
    return Checkpoint.of_files(folder / name for name in files if name.endswith(".safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that was just written."""
    return dict(json.loads(path.read_text()))
