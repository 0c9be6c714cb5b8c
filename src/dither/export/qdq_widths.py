"""Four-bit weights as the int4 of ONNX: half the bytes in the file, widened to int8 once when a session starts."""

from collections.abc import Collection

import numpy as np
import onnx
from jaxtyping import Integer
from onnx import TensorProto, helper

from dither.export.graph import Graph

MIDDLE = 128 - 8  # between the zero of eight bits and that of four


def narrow(model: onnx.ModelProto, layers: Collection[str]) -> None:
    """Store the codes of these layers in four bits, in place; what reads them gets eight through a Cast."""
    graph = Graph(model.graph)
    for layer in layers:
        name = f"model.{layer}.codes"
        codes, kernel = graph.value(name), graph.value(f"{name}.uint8")
        if codes is not None:
            _store(graph, name, codes, TensorProto.INT4, TensorProto.INT8)
        elif kernel is not None:
            _store(graph, f"{name}.uint8", kernel - MIDDLE, TensorProto.UINT4, TensorProto.UINT8)
            zero = graph.value(f"{name}.uint8_zero_point")
            if zero is not None:
                graph.constant(f"{name}.uint8_zero_point", np.asarray(zero - np.uint8(MIDDLE)))


def _store(graph: Graph, name: str, codes: Integer[np.ndarray, "..."], four: int, eight: int) -> None:
    packed = TensorProto(name=name, data_type=four, dims=list(codes.shape), raw_data=nibbles(codes))
    graph.store(packed)
    readers, wide = list(graph.readers[name]), f"{name}.wide"
    graph.insert(readers[0], [helper.make_node("Cast", [name], [wide], to=eight)])
    for node in readers:
        graph.rename_input(node, list(node.input).index(name), wide)


def nibbles(codes: Integer[np.ndarray, "..."]) -> bytes:
    """Two codes a byte, the first in the lower half."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    even = np.pad(flat, (0, len(flat) % 2)).reshape(-1, 2)
    return bytes((even[:, 0] | even[:, 1] << 4).astype(np.uint8).tobytes())
