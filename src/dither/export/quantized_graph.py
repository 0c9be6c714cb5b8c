"""The quantizers of an ONNX model in the QDQ form: activations, weights of layers, biases, each with its scheme.

Raises where a node quantizes in a way that is not known here, by the node's name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from dither.errors import InputError, PathError
from dither.export.graph import Array, Graph, attributes
from dither.export.sessions import own_weights

_LAYERS = ("Conv", "Gemm", "MatMul")
_INTEGER_NODES = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "MatMulNBits")


@dataclass(frozen=True)
class ActivationNode:
    """A QuantizeLinear of a computed tensor and the range [low, high] that its codes reach."""

    node: onnx.NodeProto
    low: float
    high: float


@dataclass(frozen=True)
class LayerNode:
    """A convolution or product with a constant quantized weight.

    `axis` is that of the outputs in the stored codes; `bias` is the DequantizeLinear of its int32 bias.
    """

    node: onnx.NodeProto
    weight: onnx.NodeProto
    axis: int
    bias: onnx.NodeProto | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.node.name or self.node.output[0])


def read_model(path: Path) -> onnx.ModelProto:
    """A model in the QDQ form.

    Raises:
        PathError, InputError: there is no such file, it is no ONNX model, or it holds no quantizers.
    """
    if not path.is_file():
        raise PathError(f"expected an ONNX file, got {str(path)!r}, which does not exist")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise InputError(f"{path.name} is no ONNX model: {str(error).splitlines()[0]}") from None
    kinds = {node.op_type: node for node in model.graph.node}
    for kind, node in kinds.items():
        if kind.startswith("QLinear") or kind in _INTEGER_NODES:
            name = node.name or node.output[0]
            raise InputError(
                f"{path.name}: node {name!r} is a {kind}; models in the QDQ form can be requantized "
                "(QuantizeLinear and DequantizeLinear; quant_format=QuantFormat.QDQ in ONNX Runtime)"
            )
    if "DequantizeLinear" not in kinds:
        raise InputError(f"{path.name} is not quantized: it holds no DequantizeLinear; quantize it first")
    own_weights(model)
    return model


def scheme(graph: Graph, node: onnx.NodeProto) -> tuple[Array, Array]:
    """Scale and zero-point of a quantizing node.

    Raises:
        InputError: they are computed, blocked, or not of 8 bits; the message names the node.
    """
    name = node.name or node.output[0]
    scale, kind = graph.value(node.input[1]), np.dtype(np.uint8)
    if scale is None or (len(node.input) > 2 and graph.value(node.input[2]) is None):
        raise InputError(f"node {name!r} has a scale or zero-point that is computed; only constants can be requantized")
    if attributes(node).get("block_size"):
        raise InputError(f"node {name!r} quantizes by blocks; only tensors and channels can be requantized")
    zero = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros_like(scale, dtype=kind)
    zero = np.zeros_like(scale, dtype=kind) if zero is None else zero
    if zero.dtype not in (np.uint8, np.int8, np.int32):
        raise InputError(f"node {name!r} has codes of type {zero.dtype}; those of 8 bits can be requantized")
    return scale, zero


def activations(graph: Graph) -> Iterator[ActivationNode]:
    """Every quantizer of a computed tensor."""
    for node in graph.of_type("QuantizeLinear"):
        scale, zero = scheme(graph, node)
        if scale.ndim and scale.size > 1:
            name = node.name or node.output[0]
            raise InputError(f"node {name!r} quantizes activations per channel; one scale a tensor can be requantized")
        limits = np.iinfo(zero.dtype)
        ends = [float(scale.reshape(())) * (code - int(zero.reshape(()))) for code in (limits.min, limits.max)]
        yield ActivationNode(node, ends[0], ends[1])


def layers(graph: Graph) -> Iterator[LayerNode]:
    """Every layer whose weight is constant codes, in order."""
    for node in graph.of_type(*_LAYERS):
        weight = graph.made_by(node.input[1], "DequantizeLinear")
        if weight is None or weight.input[0] not in graph.constants:
            continue
        scheme(graph, weight)
        bias = graph.made_by(node.input[2], "DequantizeLinear") if len(node.input) > 2 else None
        last = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB"))
        axis = len(graph.constants[weight.input[0]].dims) - 1 if last else 0
        yield LayerNode(node, weight, axis, bias)


def real(graph: Graph, node: onnx.NodeProto) -> Array:
    """The exact values of a DequantizeLinear of constants, in float64."""
    codes, (scale, zero) = graph.value(node.input[0]), scheme(graph, node)
    if codes is None:
        raise InputError(f"node {node.name or node.output[0]!r} reads codes that are computed")
    axis = attributes(node).get("axis", 1)
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[axis] = -1
    parts = (
        part.reshape(shape if scale.size > 1 else ()) for part in (scale.astype(np.float64), zero.astype(np.int64))
    )
    step, middle = parts
    return np.asarray(step * (codes.astype(np.int64) - middle))
