"""ONNX Runtime on the CPU, with the same integer products on every processor.

x86 processors without VNNI add pairs of uint8 × int8 products in 16 bits, which can saturate. With `EXACT` ONNX Runtime
gives them uint8 weights there, whose products cannot; elsewhere the entry changes nothing.

Source: ONNX Runtime's documentation of quantization, "When to use reduce-range and per-channel quantization".
"""

from pathlib import Path

import numpy as np
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


def own_zero_points(model: onnx.ModelProto) -> None:
    """Give each int8 weight a zero-point that no other reads, in place.

    ONNX Runtime names the uint8 copies after them and fails on a second copy of one name.
    """
    graph = Graph(model.graph)
    for node in graph.of_type("DequantizeLinear"):
        zero = graph.value(node.input[2]) if len(node.input) == 3 and node.input[0] in graph.constants else None
        if zero is not None and zero.dtype == np.int8 and graph.only_reader(node.input[2]) is None:
            graph.rename_input(node, 2, graph.constant(f"{node.output[0]}.zero_point", zero))
    graph.remove_unused()
