"""Sessions of ONNX Runtime: exact integer products, also where models share the zero-points of their weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dither.export.graph import Graph
from dither.export.quantized_graph import read_model
from dither.export.sessions import open_session, own_weights


def two_layers() -> onnx.ModelProto:
    """x @ a @ b with int8 weights of one zero-point and the largest codes, so that pairs of products pass 16 bits."""
    node = helper.make_node
    parts = {
        "scale": np.float32(1 / 255), "zero": np.uint8(0), "step": np.float32(1 / 127), "middle": np.int8(0),
        "a": np.full((16, 16), 127, np.int8), "b": np.full((16, 16), -127, np.int8), "wide": np.float32(16 / 255),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["x_codes"]),
        node("DequantizeLinear", ["x_codes", "scale", "zero"], ["x_real"]),
        *(node("DequantizeLinear", [name, "step", "middle"], [f"{name}_real"]) for name in "ab"),
        node("MatMul", ["x_real", "a_real"], ["y"]),
        node("QuantizeLinear", ["y", "wide", "zero"], ["y_codes"]),
        node("DequantizeLinear", ["y_codes", "wide", "zero"], ["y_real"]),
        node("MatMul", ["y_real", "b_real"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes, "layers", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in parts.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_products_of_the_largest_codes_do_not_saturate(tmp_path: Path) -> None:
    model = two_layers()
    onnx.save(model, str(tmp_path / "shared.onnx"))
    found = read_model(tmp_path / "shared.onnx")
    zeros = [node.input[2] for node in Graph(found.graph).of_type("DequantizeLinear")]
    assert zeros == ["zero", "a_real.zero_point", "middle", "zero"]  # activations share theirs
    (answer,) = open_session(found).run(None, {"x": np.ones((1, 16), np.float32)})
    np.testing.assert_allclose(answer, -256.0, rtol=1e-5)


@pytest.mark.parametrize("dequantized", [1, 3])
def test_three_products_of_one_weight_get_a_copy_each(dequantized: int) -> None:
    """The weight is dequantized once for all, or for each."""
    model = two_layers()
    graph = Graph(model.graph)
    graph.proto.node.extend([
        helper.make_node("DequantizeLinear", ["a", "step", "middle"], ["c_real"]),
        helper.make_node("MatMul", ["y_real", "c_real"], ["again"]),
        helper.make_node("Sub", ["z", "again"], ["none"]),
    ])  # fmt: skip
    graph.proto.output[0].name = "none"
    graph.of_type("DequantizeLinear")[2].input[0] = "a"
    graph.refresh()
    for number, name in ((1, "b_real"), (2, "c_real")):
        graph.rename_input(graph.of_type("MatMul")[number], 1, "a_real" if dequantized == 1 else name)
    own_weights(model)
    onnx.checker.check_model(model, full_check=True)
    weights = [node for node in Graph(model.graph).of_type("DequantizeLinear") if node.input[2] != "zero"]
    for number in (0, 2):
        assert len({node.input[number] for node in weights}) == 3
    (answer,) = open_session(model).run(None, {"x": np.ones((1, 16), np.float32)})
    np.testing.assert_allclose(answer, 0.0, atol=1e-5)
    model.graph.output[0].name = "z"
    (answer,) = open_session(model).run(None, {"x": np.ones((1, 16), np.float32)})
    np.testing.assert_allclose(answer, 256.0, rtol=1e-5)
