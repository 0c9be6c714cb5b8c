"""onnx: a graph for ONNX Runtime whose linear layers are MatMulNBits over dither's own codes of 2, 4 or 8 bits.

The whole network is traced once; a language model takes `input_ids` [batch, length] and gives `logits`, without a cache
of keys and values, a vision model takes `pixel_values`. Blocks are powers of two from 16 columns on; other groups are
written as blocks that repeat their scale. The file is run in ONNX Runtime and its logits are compared with torch's.

Source: the contributed operator com.microsoft::MatMulNBits, version 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float, Int, UInt8
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from dither.errors import InputError, StorageError
from dither.export.folder import cast, check_tensors, chosen_dtype, copy_companions, write_config
from dither.export.integers import IntegerWeight, integer_weight, refused
from dither.export.sessions import open_session
from dither.export.source import Source, skeleton
from dither.export.tracing import FILE, example, run_graph, trace
from dither.export.written import Written, scale_bound
from dither.formats.packing import pack

TARGET = "onnx"
BITS = (2, 4, 8)
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
_EXACT = 1  # accuracy_level: activations stay in float32; 4 lets them be rounded to 8 bits, which is faster
_LOGITS = {torch.float32: 1e-4, torch.float16: 2e-2}  # of the largest: sums in another order, or in float16
Node = tuple[dict[str, int], list[Any]]  # attributes and constant inputs of an operator


class MatMulNBits(nn.Module):
    """A linear layer that is the operator when it is exported, and its definition in torch otherwise."""

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_as_stored, self.size = weight, block_size(weight)
        blocks = weight.grouped(self.size)
        self.register_buffer("packed", packed_codes(blocks.codes, self.size, weight.bits))
        self.register_buffer("scales", cast("scale", blocks.scale, dtype))
        zeros = None if weight.symmetric else pack(blocks.zero_point.to(torch.uint8), weight.bits)
        self.register_buffer("zero_points", zeros)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """As torch.nn.Linear."""
        rows, columns = self.weight_as_stored.codes.shape
        if not torch.compiler.is_exporting():
            return functional.linear(x, dequantized(self.weight_as_stored).to(x.dtype), self.bias)
        inputs = [x, self.packed, self.scales, *([] if self.zero_points is None else [self.zero_points])]
        attributes = {"K": columns, "N": rows, "bits": self.weight_as_stored.bits, "block_size": self.size}
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", inputs, {**attributes, "accuracy_level": _EXACT},
            dtype=x.dtype, shape=(*x.shape[:-1], rows), version=1,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias


def dequantized(weight: IntegerWeight) -> Float[Tensor, "o i"]:
    """scale * (code - zero_point)."""
    columns = weight.codes.shape[1]
    column = torch.arange(columns) // (weight.group_size or columns)
    return weight.scale[:, column] * (weight.codes.int() - weight.zero_point[:, column])


def block_size(weight: IntegerWeight) -> int:
    """The largest block that the groups consist of."""
    if weight.group_size is None:
        return LARGEST_BLOCK
    return min(weight.group_size & -weight.group_size, LARGEST_BLOCK)  # the power of two in it


def packed_codes(codes: UInt8[Tensor, "o i"], size: int, bits: int) -> UInt8[Tensor, "o blocks bytes"]:
    """Codes of each block as bytes, the first in the lowest bits; the last block is filled with zeros."""
    whole = functional.pad(codes, (0, -codes.shape[1] % size)).unflatten(1, (-1, size))
    stored: Tensor = pack(whole.flatten(0, 1), bits).unflatten(0, whole.shape[:2])
    return stored


def write(source: Source, folder: Path, dtype: str) -> Written:
    """Write the graph and the files beside it.

    Raises:
        SpecError, InputError: the operator cannot hold a layer; nothing is written then.
        StorageError: ONNX Runtime computes something else than torch.
    """
    kind = chosen_dtype(source, "float32" if dtype == "auto" else dtype)
    if kind not in _LOGITS:
        raise InputError(f"onnx: expected float32 or float16, got {dtype}; ONNX Runtime computes in these")
    model = skeleton(source)
    check_tensors(source, model)
    for name in source.layers:
        _check(source, name, model)
    model = _filled(source, model, kind)
    inputs = example(source, model, kind)
    with torch.no_grad():
        expected = model(**inputs).logits.float().numpy()
    files = trace(model, inputs, folder)
    files += copy_companions(source, folder)
    files.append(write_config(source, folder, kind, None))
    difference = _run(folder / FILE, inputs, expected, _LOGITS[kind])
    nodes = _nodes(folder / FILE)
    notes = [f"ONNX Runtime gives torch's logits within {difference:.1e} of the largest"]
    return Written(
        files, kind, lambda name: read_weight(nodes[name]), lambda name: None,
        lambda name: scale_bound(_integers(source, name), kind), "ONNX Runtime", notes,
    )  # fmt: skip


def _integers(source: Source, name: str) -> IntegerWeight:
    return integer_weight(name, source.weight(name), TARGET, BITS)


def _check(source: Source, name: str, model: nn.Module) -> None:
    if not isinstance(model.get_submodule(name), nn.Linear):
        raise refused(name, TARGET, f"a {type(model.get_submodule(name)).__name__}: MatMulNBits is a linear layer")
    if source.layers[name]["activations"] is not None:
        raise refused(name, TARGET, "quantized activations")
    if block_size(_integers(source, name)) < SMALLEST_BLOCK:
        size = source.layers[name]["weights"]["group_size"]
        raise refused(name, TARGET, f"groups of {size} columns: blocks are powers of two from {SMALLEST_BLOCK} on")


def _filled(source: Source, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with operators for its quantized layers and values for all else."""
    kept = {name: cast(name, tensor, dtype) for name, tensor in source.kept()}
    for name in source.layers:
        holder, _, leaf = name.rpartition(".")
        bias = kept.pop(f"{name}.bias", None)
        setattr(model.get_submodule(holder), leaf, MatMulNBits(_integers(source, name), bias, dtype))
    model.load_state_dict(kept, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise StorageError(f"{source.name} does not hold {left[0]}")
    return model.eval()


def _run(path: Path, inputs: Mapping[str, Tensor], expected: Float[np.ndarray, "..."], limit: float) -> float:
    """The largest difference of logits over the largest logit.

    Raises:
        StorageError: it is above the limit.
    """
    found = run_graph(open_session(path), inputs)
    difference = float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())
    if not difference <= limit:
        raise StorageError(f"{path.name}: ONNX Runtime's logits differ from torch's by {difference:.1e} of the largest")
    return difference


def _nodes(path: Path) -> dict[str, Node]:
    """Attributes and constant inputs of each MatMulNBits by the name of its layer."""
    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            name = node.input[1].removeprefix("model.").removesuffix(".packed")
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            found[name] = (attributes, [numpy_helper.to_array(constants[part]) for part in node.input[1:] if part])
    return found


def read_weight(node: Node) -> Float[np.ndarray, "o i"]:
    """The weight decoded from a node with numpy alone, from the operator's definition."""
    attributes, (codes, scales, *zeros) = node
    rows, columns, bits, size = (attributes[key] for key in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // size)
    values = _fields(codes.reshape(rows * blocks, -1), bits).reshape(rows, blocks, size)
    zero = np.full((rows, blocks), 2 ** (bits - 1))
    if zeros:
        zero = _fields(zeros[0].reshape(rows, -1), bits)[:, :blocks]
    real = (values - zero[:, :, None]).astype(np.float32) * scales.reshape(rows, blocks, 1).astype(np.float32)
    weight: Float[np.ndarray, "o i"] = real.reshape(rows, -1)[:, :columns]
    return weight


def _fields(stored: UInt8[np.ndarray, "r bytes"], bits: int) -> Int[np.ndarray, "r n"]:
    """The fields of `bits` bits in each byte, lowest first."""
    shifts = np.arange(0, 8, bits)
    fields: Int[np.ndarray, "r n"] = (stored.astype(np.int64)[..., None] >> shifts & 2**bits - 1).reshape(
        len(stored), -1
    )
    return fields
