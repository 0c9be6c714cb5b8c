"""An independent reader of onnx-qdq files: weights decoded with numpy from the operators' definitions alone."""

import numpy as np
import onnx
import torch
from jaxtyping import Float, Int
from onnx import TensorProto, numpy_helper
from torch import Tensor

from dither.errors import StorageError


def read_weight(model: onnx.ModelProto, layer: str, factor: Float[np.ndarray, " o"] | None) -> Float[np.ndarray, "o i"]:
    """The weight of a layer; `factor` is what its rows were multiplied by when a norm was folded into them.

    Raises:
        StorageError: the graph does not hold the layer.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    name = f"model.{layer}.codes"
    if f"{name}.uint8" in tensors:
        weight = _conv_integer(model, tensors, f"{name}.uint8")
    elif name in tensors:
        weight = _dequantized(model, tensors, name)
    else:
        raise StorageError(f"{layer} was written, but its codes are not in the graph")
    rows = weight if factor is None else weight / np.asarray(factor)[:, None]
    result: Float[np.ndarray, "o i"] = rows.astype(np.float32)
    return result


def read_kept(model: onnx.ModelProto, name: str) -> Tensor | None:
    """A tensor that was not quantized; None where the graph holds it in another form."""
    for tensor in model.graph.initializer:
        if tensor.name == f"model.{name}":
            return torch.from_numpy(numpy_helper.to_array(tensor).copy())
    return None


def _dequantized(model: onnx.ModelProto, tensors: dict[str, TensorProto], name: str) -> Float[np.ndarray, "o i"]:
    read = {name} | {node.output[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] == name}
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in read)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    codes = np.moveaxis(_integers(tensors[name]), axis, 0)
    rows = codes.reshape(len(codes), -1)
    scale, zero = (numpy_helper.to_array(tensors[part]).reshape(-1, 1) for part in node.input[1:3])
    weight: Float[np.ndarray, "o i"] = scale.astype(np.float64) * (rows - zero.astype(np.int64))
    return weight


def _conv_integer(model: onnx.ModelProto, tensors: dict[str, TensorProto], name: str) -> Float[np.ndarray, "o i"]:
    """A ConvInteger's kernel, whose scale times that of its input stands in the product behind it."""
    nodes = list(model.graph.node)
    read = {name} | {node.output[0] for node in nodes if node.op_type == "Cast" and node.input[0] == name}
    conv = next(node for node in nodes if node.op_type == "ConvInteger" and node.input[1] in read)
    cast = next(node for node in nodes if node.input and node.input[0] == conv.output[0])
    product = next(node for node in nodes if node.op_type == "Mul" and node.input[0] == cast.output[0])
    quantize = next(node for node in nodes if node.output[0] == conv.input[0])
    step = float(numpy_helper.to_array(tensors[quantize.input[1]]))
    scale = numpy_helper.to_array(tensors[product.input[1]]).reshape(-1, 1).astype(np.float64) / step
    codes = _integers(tensors[name])
    zero = int(numpy_helper.to_array(tensors[conv.input[3]]))
    weight: Float[np.ndarray, "o i"] = scale * (codes.reshape(len(codes), -1) - zero)
    return weight


def _integers(tensor: TensorProto) -> Int[np.ndarray, "..."]:
    """Codes as int64; the first of two that share a byte is in its lower half."""
    if tensor.data_type not in (TensorProto.INT4, TensorProto.UINT4):
        return numpy_helper.to_array(tensor).astype(np.int64)
    stored = np.frombuffer(tensor.raw_data, dtype=np.uint8)
    both = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1)[: int(np.prod(tensor.dims))].astype(np.int64)
    if tensor.data_type == TensorProto.INT4:
        both = both - 16 * (both > 7)
    return both.reshape(tuple(tensor.dims))
