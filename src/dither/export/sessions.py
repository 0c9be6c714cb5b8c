"""ONNX Runtime on the CPU, with the same integer products on every processor.

x86 processors without VNNI add pairs of uint8 × int8 products in 16 bits, which can saturate. With `EXACT` ONNX Runtime
gives them uint8 weights there, whose products cannot; elsewhere the entry changes nothing.

Source: ONNX Runtime's documentation of quantization, "When to use reduce-range and per-channel quantization".
"""

import copy
from pathlib import Path

import onnx
import onnxruntime

from dither.export.graph import Graph

EXACT = ("session.x64quantprecision", "1")
_ERRORS = 3  # the severity from which ONNX Runtime speaks


def open_session(
    graph: Path | onnx.ModelProto, *, optimized: Path | None = None, threads: int = 0
) -> onnxruntime.InferenceSession:
    """A graph, ready to run.

    Args:
        graph: a file, with its external data beside it, or a model in memory.
        optimized: where the graph as ONNX Runtime computes it is written.
        threads: of one operator; 0 for ONNX Runtime's choice.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT)
    options.log_severity_level = _ERRORS
    options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def own_weights(model: onnx.ModelProto) -> None:
    """Give each product of int8 weights codes and a zero-point that no other reads, in place.

    ONNX Runtime names the uint8 copies after them and fails on a second copy of one name. For that, a layer that is
    called several times takes its bytes as often.
    """
    graph = Graph(model.graph)
    for node in _weights(graph):
        real = node.output[0]
        for number, reader in enumerate(graph.readers.get(real, [])[1:], 1):
            twin = copy.deepcopy(node)
            twin.name, twin.output[0] = "", f"{real}.{number}"
            graph.insert(reader, [twin])
            graph.rename_input(reader, list(reader.input).index(real), f"{real}.{number}")
    for node in _weights(graph):
        for number, kind in ((0, "codes"), (2, "zero_point"))[: len(node.input) - 1]:
            name = node.input[number]
            if _is_int8(graph, name) and graph.only_reader(name) is None:
                own = copy.deepcopy(graph.constants[name])
                own.name = f"{node.output[0]}.{kind}"
                graph.rename_input(node, number, graph.store(own))
    graph.remove_unused()


def _weights(graph: Graph) -> list[onnx.NodeProto]:
    return [node for node in graph.of_type("DequantizeLinear") if _is_int8(graph, node.input[0])]


def _is_int8(graph: Graph, name: str) -> bool:
    return name in graph.constants and bool(graph.constants[name].data_type == onnx.TensorProto.INT8)
