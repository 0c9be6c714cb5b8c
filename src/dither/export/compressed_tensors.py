"""compressed-tensors: the folder that vLLM, SGLang and transformers open.

Weights of 2 to 8 bits are `pack-quantized`: unsigned codes (the format's signed value plus 2^(B-1), the same shift for
zero-points) as one least-significant-bit-first stream a row in 32-bit words, zero-points packed along the outputs. That
is the layout of compressed-tensors from 0.18 on; before, 3, 5, 6 and 7 bits left gaps. 8-bit weights with 8-bit
activations are `int-quantized`: plain signed bytes.

Source: the compressed-tensors library (vllm-project), formats `pack-quantized` and `int-quantized`, read from 0.20.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dither.errors import InputError
from dither.export.folder import (
    cast,
    check_tensors,
    checkpoint_names,
    chosen_dtype,
    own_names,
    read_back,
    read_json,
    write_config,
    write_folder,
)
from dither.export.integers import IntegerWeight, integer_weight, refused
from dither.export.source import Source, skeleton
from dither.export.written import Written, scale_bound
from dither.formats.packing import pack
from dither.formats.spec import QuantSpec
from dither.models.checkpoint import Checkpoint
from dither.models.network import CONFIG

TARGET = "compressed-tensors"
LAYOUT = "0.18.0"  # the first release that reads dense streams of 3, 5, 6 and 7 bits
BITS = (2, 3, 4, 5, 6, 7, 8)
Args = dict[str, Any]


@dataclass(frozen=True)
class Scheme:
    """How a group of layers is stored; layers with equal schemes share a config group."""

    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    inputs: QuantSpec | None

    @property
    def format(self) -> str:
        """Plain bytes for 8-bit weights of rows with quantized inputs, packed words for all else."""
        whole = self.bits == 8 and self.symmetric and self.strategy != "group" and self.inputs is not None
        return "int-quantized" if whole else "pack-quantized"

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """The config group."""
        weights = _args(self.bits, self.symmetric, self.strategy, self.group_size, dynamic=False)
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": None if self.inputs is None else _input_args(self.inputs),
            "output_activations": None,
            "format": self.format,
        }


def _args(bits: int, symmetric: bool, strategy: str, group_size: int | None, *, dynamic: bool) -> Args:
    args: Args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return args | {"group_size": group_size, "dynamic": dynamic}


def _input_args(spec: QuantSpec) -> Args:
    strategy = "token" if spec.granularity == "token" else "tensor"
    return _args(spec.bits, spec.symmetry == "sym", strategy, None, dynamic=spec.dynamic)


def scheme(layer: str, weight: IntegerWeight, inputs: QuantSpec | None) -> Scheme:
    """The scheme of a layer.

    Raises:
        SpecError: its activations are in a format that compressed-tensors does not have.
    """
    if inputs is not None and (inputs.kind != "int" or inputs.bits != 8 or inputs.granularity == "channel"):
        raise refused(layer, TARGET, f"activations in {inputs}: they are int8, one range a tensor or a token")
    if weight.group_size is not None:
        return Scheme(weight.bits, weight.symmetric, "group", weight.group_size, inputs)
    strategy = "tensor" if weight.per_tensor and weight.symmetric else "channel"
    return Scheme(weight.bits, weight.symmetric, strategy, None, inputs)


def write(source: Source, folder: Path, dtype: str) -> Written:
    """Write the folder.

    Raises:
        SpecError, InputError: the format cannot hold the network; nothing is written then.
    """
    model, kind = skeleton(source), chosen_dtype(source, dtype)
    check_tensors(source, model)
    schemes = {name: _scheme_of(source, name, model) for name in source.layers}
    named = own_names(model, [f"{name}.weight" for name in schemes])
    modules = {name: named[f"{name}.weight"].removesuffix(".weight") for name in schemes}
    kept = own_names(model, list(source.kept_names))
    files = write_folder(folder, _tensors(source, schemes, modules, kept, kind), source)
    quantization = configuration(schemes, modules, _ignored(model, source))
    files.append(write_config(source, folder, kind, quantization))
    tensors = read_back(folder, files)
    stored = read_json(folder / CONFIG)["quantization_config"]
    return Written(
        files, kind, lambda name: read_weight(tensors, modules[name], stored), lambda name: tensors.read(kept[name]),
        lambda name: scale_bound(integer_weight(name, source.weight(name), TARGET, BITS), kind),
        "vLLM, SGLang, or transformers with compressed-tensors installed", notes(schemes),
    )  # fmt: skip


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    """Which programs do not open it, or not without a word."""
    distinct, found = set(schemes.values()), []
    if any(not one.symmetric for one in distinct):
        found.append(
            "zero-points: transformers needs CompressedTensorsConfig(dequantize=True); vLLM reads 4 and 8 bits"
        )
    if any(one.bits not in (4, 8) for one in distinct):
        found.append("bits other than 4 and 8: a recent vLLM; SGLang reads 4 and 8 only")
    if len(distinct) > 1:
        found.append("several formats: transformers opens it without dequantize=True only")
    return found


def _scheme_of(source: Source, name: str, model: nn.Module) -> Scheme:
    if not isinstance(model.get_submodule(name), nn.Linear):
        raise refused(name, TARGET, f"a {type(model.get_submodule(name)).__name__}: it has linear layers only")
    inputs = source.layers[name]["activations"]
    weight = integer_weight(name, source.weight(name), TARGET, BITS)
    return scheme(name, weight, None if inputs is None else QuantSpec(**inputs["spec"]))


def _ignored(model: nn.Module, source: Source) -> list[str]:
    """Linear layers that are not quantized, by their names in files."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = [f"{name}.weight" for name in names if name not in source.layers]
    return [name.removesuffix(".weight") for name in checkpoint_names(model, left).values()]


def configuration(schemes: Mapping[str, Scheme], modules: Mapping[str, str], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config`: one group a scheme, which names its layers unless there is only one scheme."""
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {
        f"group_{number}": one.to_json(
            ["Linear"] if len(distinct) == 1 else [modules[name] for name, other in schemes.items() if other == one]
        )
        for number, one in enumerate(distinct)
    }
    formats = {one.format for one in distinct}
    return {
        "quant_method": TARGET,
        "version": LAYOUT,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": ignored,
    }


def _tensors(
    source: Source,
    schemes: Mapping[str, Scheme],
    modules: Mapping[str, str],
    kept: Mapping[str, str],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source.kept():
        yield kept[name], cast(name, tensor, dtype)
    for name, one in schemes.items():
        weight = integer_weight(name, source.weight(name), TARGET, BITS)
        for part, tensor in packed(name, weight, one, dtype).items():
            yield f"{modules[name]}.{part}", tensor
        for part, tensor in _input_tensors(source, name, one, dtype).items():
            yield f"{modules[name]}.{part}", tensor


def packed(name: str, weight: IntegerWeight, one: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer's weight by their short names."""
    scale = weight.scale[:1, 0] if one.strategy == "tensor" else weight.scale
    parts = {"weight_scale": cast(f"{name} scale", scale, dtype)}
    if one.format == "int-quantized":
        return {"weight": (weight.codes.to(torch.int16) - 128).to(torch.int8), **parts}
    if not weight.symmetric:
        parts["weight_zero_point"] = words(weight.zero_point.T.to(torch.uint8), weight.bits).T
    shape = torch.tensor(weight.codes.shape, dtype=torch.int64)
    return {"weight_packed": words(weight.codes, weight.bits), "weight_shape": shape, **parts}


def words(codes: UInt8[Tensor, "r n"], bits: int) -> Int[Tensor, "r w"]:
    """Each row as a stream of bits in 32-bit words, lowest bit first; the last word is filled with zeros."""
    stream = pack(codes.contiguous(), bits)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous()
    return padded.view(torch.int32)


def _input_tensors(source: Source, name: str, one: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    if one.inputs is None or one.inputs.dynamic:
        return {}
    prefix = f"{name}.input_quantizer."
    parts = {"input_scale": cast(f"{name} input scale", source.read(prefix + "scale").reshape(1), dtype)}
    if one.inputs.symmetry != "sym":
        zero = source.read(prefix + "zero_point").reshape(1)
        if not torch.equal(zero, zero.round()):
            raise InputError(f"{name}: its inputs have a zero-point that is no integer; export --to dequantized")
        parts["input_zero_point"] = (zero - 128).clamp(-128, 127).to(torch.int8)
    return parts


def read_weight(tensors: Checkpoint, name: str, config: Mapping[str, Any]) -> Float[np.ndarray, "o i"]:
    """The weight of a layer decoded from the file with numpy alone, from the format's definition.

    `config` is the `quantization_config`; it shares no code with the writer, which it checks.
    """
    groups = config["config_groups"].values()
    args = next(g for g in groups if name in g["targets"] or g["targets"] == ["Linear"])["weights"]
    scale = tensors.read(f"{name}.weight_scale").float().numpy()
    if f"{name}.weight_packed" in tensors.places:
        rows, columns = tensors.read(f"{name}.weight_shape").tolist()
        signed = _unsigned(tensors.read(f"{name}.weight_packed").numpy(), args["num_bits"], columns)
        signed = signed - 2 ** (args["num_bits"] - 1)
    else:
        signed = tensors.read(f"{name}.weight").numpy().astype(np.int64)
        rows, columns = signed.shape
    scale = np.broadcast_to(scale.reshape(-1, scale.shape[-1] if scale.ndim > 1 else 1), (rows, scale.shape[-1]))
    zero = np.zeros_like(scale)
    if not args["symmetric"]:
        stored = tensors.read(f"{name}.weight_zero_point").numpy()
        zero = (_unsigned(stored.T.copy(), args["num_bits"], rows) - 2 ** (args["num_bits"] - 1)).T.astype(np.float32)
    column = np.arange(columns) // (args["group_size"] or columns)
    result: Float[np.ndarray, "o i"] = scale[:, column] * (signed.astype(np.float32) - zero[:, column])
    return result


def _unsigned(stored: Int[np.ndarray, "r w"], bits: int, count: int) -> Int[np.ndarray, "r n"]:
    """Codes of a row's stream of bits, each word from its lowest bit up."""
    bits_of = np.unpackbits(np.ascontiguousarray(stored).astype("<i4").view(np.uint8), axis=1, bitorder="little")
    places = bits_of[:, : count * bits].reshape(len(stored), count, bits).astype(np.float32)
    codes: Int[np.ndarray, "r n"] = (places @ (1 << np.arange(bits)).astype(np.float32)).astype(np.int64)
    return codes
