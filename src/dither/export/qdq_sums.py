"""Residual sums of convolutions as integers: what goes into a sum gets a quantizer of its own.

dither quantizes inputs of layers, so a convolution before a sum gives floats, and ONNX Runtime has no fast kernel for
that. Where the other summand is quantized for a layer behind it, the sum reads those codes; a convolution's output gets
a range measured on pictures. The convolutions become QLinearConv then, most sums QLinearAdd; answers move a little.

Source: the patterns of ONNX Runtime's QDQ transformers, read in 2026.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from dither.export.graph import Graph
from dither.export.sessions import open_session
from dither.export.tracing import FILE

_LEVELS = 255
Range = tuple[float, float]


def quantize_sums(model: onnx.ModelProto, pictures: Iterable[Tensor]) -> int:
    """Give the sums of a traced graph quantized summands, in place; returns how many sums."""
    graph = Graph(model.graph)
    _share_quantizers(graph)
    sums = [node for node in graph.of_type("Add") if _is_residual(graph, node)]
    new = {name for node in sums for name in node.input if _codes_of(graph, name) is None}
    ranges = measured(model, sorted(new), pictures) if new else {}
    for node in sums:
        for number, name in enumerate(list(node.input)):
            known = _codes_of(graph, name)
            if known is not None:
                graph.move_before(node, known)
            graph.rename_input(node, number, known or _quantized(graph, node, name, ranges[name]))
    return len(sums)


def _share_quantizers(graph: Graph) -> None:
    """Let layers that quantize one tensor alike read the same codes, so that it has one reader in front of a sum."""
    first: dict[tuple[str, bytes, bytes], str] = {}
    for node in graph.of_type("QuantizeLinear"):
        values = graph.values(node.input[1:3])
        behind = graph.only_reader(node.output[0])
        if values is None or values[0].ndim or behind is None or behind.op_type != "DequantizeLinear":
            continue
        known = first.setdefault((node.input[0], values[0].tobytes(), values[1].tobytes()), behind.output[0])
        for reader in graph.readers.get(behind.output[0], []) if known != behind.output[0] else ():
            graph.rename_input(reader, list(reader.input).index(behind.output[0]), known)
    graph.remove_unused()


def _is_residual(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether two computed tensors meet, of which one is a convolution's output and no other layer's."""
    return not any(name in graph.constants for name in node.input) and any(
        _is_convolution(graph, name) and graph.only_reader(name) is not None for name in node.input
    )


def _is_convolution(graph: Graph, name: str) -> bool:
    norm = graph.made_by(name, "BatchNormalization")
    return graph.made_by(name if norm is None else norm.input[0], "Conv") is not None


def _codes_of(graph: Graph, name: str) -> str | None:
    """The dequantized form of a tensor that is quantized with one scale for a layer; None where it is for none."""
    for reader in graph.readers.get(name, []):
        scale = graph.value(reader.input[1]) if reader.op_type == "QuantizeLinear" else None
        behind = graph.only_reader(reader.output[0]) if scale is not None and scale.ndim == 0 else None
        if behind is not None and behind.op_type == "DequantizeLinear":
            return str(behind.output[0])
    return None


def _quantized(graph: Graph, node: onnx.NodeProto, name: str, seen: Range) -> str:
    """The dequantized form of a tensor, with a quantizer put in front of the node that reads it."""
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    scale = np.array((high - low) / _LEVELS or 1.0, dtype=np.float32)
    zero = np.array(np.clip(np.rint(-low / scale), 0, _LEVELS), dtype=np.uint8)
    parts = [graph.constant(f"{name}.sum_scale", scale), graph.constant(f"{name}.sum_zero", zero)]
    codes, real = f"{name}.sum_codes", f"{name}.sum_real"
    graph.insert(node, [
        helper.make_node("QuantizeLinear", [name, *parts], [codes]),
        helper.make_node("DequantizeLinear", [codes, *parts], [real]),
    ])  # fmt: skip
    return real


def measured(model: onnx.ModelProto, names: list[str], pictures: Iterable[Tensor]) -> dict[str, Range]:
    """The least and the largest value of tensors inside a graph."""
    watched = copy.deepcopy(model)
    del watched.graph.output[:]
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    found: dict[str, Range] = {}
    with TemporaryDirectory() as folder:
        onnx.save(watched, str(Path(folder) / FILE))
        session = open_session(Path(folder) / FILE)
        (entry,) = session.get_inputs()
        for batch in pictures:
            for name, value in zip(names, session.run(names, {entry.name: batch.numpy()}), strict=True):
                low, high = found.get(name, (np.inf, -np.inf))
                found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found
