"""MRQ on a model that ONNX Runtime's own quantizer made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from dither.errors import InputError, PathError, SpecError
from dither.export.graph import Graph
from dither.export.quantized_graph import layers, real
from dither.export.requantize import answers, requantize
from dither.export.requantize_onnx import pictures_like_nature

SHAPE = (16, 3, 12, 12)


class Noise(CalibrationDataReader):
    """Two batches of noise."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.batches = iter([{"x": draw.standard_normal(SHAPE).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> Any:
        return next(self.batches, None)


def network() -> onnx.ModelProto:
    """Convolution, depthwise convolution, residual sum, pooling and a classifier, with rectifiers."""
    draw = np.random.default_rng(0)
    shapes = {"a": (8, 3, 3, 3), "b": (8, 1, 3, 3), "c": (8, 8, 1, 1), "d": (8, 5)}
    parts = {
        name: draw.standard_normal(shape) * 1.4 / np.sqrt(np.prod(shape[1:]) if name != "d" else 8)
        for name, shape in shapes.items()
    }
    parts |= {f"{name}_bias": draw.standard_normal(5 if name == "d" else 8) * 0.3 for name in shapes}
    nodes = [
        helper.make_node("Conv", ["x", "a", "a_bias"], ["1"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["1"], ["2"]),
        helper.make_node("Conv", ["2", "b", "b_bias"], ["3"], "depthwise", pads=[1] * 4, group=8),
        helper.make_node("Relu", ["3"], ["4"]),
        helper.make_node("Conv", ["4", "c", "c_bias"], ["5"], "last"),
        helper.make_node("Add", ["5", "2"], ["6"]),
        helper.make_node("GlobalAveragePool", ["6"], ["7"]),
        helper.make_node("Flatten", ["7"], ["8"]),
        helper.make_node("Gemm", ["8", "d", "d_bias"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", *SHAPE[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 5])],
        [numpy_helper.from_array(x.astype(np.float32), name) for name, x in parts.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[QuantFormat], Path]:
    """The network in asymmetric uint8, by ONNX Runtime's quantizer."""
    folder = tmp_path_factory.mktemp("onnx")
    onnx.save(network(), str(folder / "float.onnx"))

    def make(form: QuantFormat = QuantFormat.QDQ) -> Path:
        path = folder / f"{form.name}.onnx"
        if not path.is_file():
            quantize_static(
                str(folder / "float.onnx"), str(path), Noise(), quant_format=form, per_channel=False,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8,
            )  # fmt: skip
        return path

    return make


@pytest.mark.parametrize("to", ["int8:channel", "int8:tensor", "int8:tensor:pow2", "int8:channel:pow2"])
def test_a_model_of_another_tool_changes_its_scheme(quantized: Callable[..., Path], to: str, tmp_path: Path) -> None:
    report = requantize(quantized(), to, tmp_path / "out.onnx")
    assert report["layers"] == 4
    model = onnx.load(tmp_path / "out.onnx")
    graph = Graph(model.graph)
    for node in graph.of_type("DequantizeLinear", "QuantizeLinear"):
        scale, zero = graph.values(node.input[1:3]) or []
        assert not zero.any()  # symmetric, or unsigned without a zero-point
        if "pow2" in to and zero.dtype != np.int32:
            assert (np.frexp(scale)[0] == 0.5).all()
    sizes = {len(graph.constants[one.weight.input[1]].dims) for one in layers(graph)}
    assert sizes == {0 if "tensor" in to else 1}
    source = onnx.load(quantized())
    pixels = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
    true, found = answers(source, pixels), answers(model, pixels)
    assert np.sqrt(np.square(found - true).mean()) < (0.12 if "pow2" in to else 0.05) * true.std()


def test_types_that_a_model_notes_of_its_codes_change_with_them(quantized: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(quantized())
    model.opset_import[0].version = 21
    model = onnx.shape_inference.infer_shapes(model)
    assert any(one.type.tensor_type.elem_type == TensorProto.UINT8 for one in model.graph.value_info)
    onnx.save(model, str(tmp_path / "noted.onnx"))
    requantize(tmp_path / "noted.onnx", "int8:tensor:pow2", tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    assert found.opset_import[0].version == 20  # transposed int8 codes do not open in 21
    pixels = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
    assert np.isfinite(answers(found, pixels)).all()


def test_weights_in_another_scheme_stay_near_what_they_were(quantized: Callable[..., Path], tmp_path: Path) -> None:
    requantize(quantized(), "int8:channel", tmp_path / "out.onnx", correct_weights=False)
    before, after = (Graph(onnx.load(path).graph) for path in (quantized(), tmp_path / "out.onnx"))
    for one, other in zip(layers(before), layers(after), strict=True):
        true, found = real(before, one.weight), real(after, other.weight)
        assert np.abs(found - true).max() <= np.abs(true).max() / 254 * 1.001


def test_folding_takes_away_the_mean_error(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """On the pictures that means were measured on, at six bits, where rounding errors are large."""
    pixels = pictures_like_nature((64, *SHAPE[1:]), -3.0, 3.0)
    errors = {}
    for fold in (False, True):
        path = tmp_path / f"{fold}.onnx"
        requantize(quantized(), "int6:tensor", path, fold_errors=fold, pixels=pixels)
        errors[fold] = answers(onnx.load(path), pixels) - answers(onnx.load(quantized()), pixels)
    assert np.abs(errors[True].mean(0)).max() < 0.4 * np.abs(errors[False].mean(0)).max()
    assert np.square(errors[True]).mean() < np.square(errors[False]).mean()


def test_what_it_does_not_know_is_named(quantized: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    (tmp_path / "text.onnx").write_text("no model")
    onnx.save(network(), str(tmp_path / "float.onnx"))
    with pytest.raises(PathError, match=r"expected an ONNX file, got .*missing\.onnx"):
        requantize(tmp_path / "missing.onnx", "int8:tensor", out)
    with pytest.raises(InputError, match=r"text\.onnx is no ONNX model"):
        requantize(tmp_path / "text.onnx", "int8:tensor", out)
    with pytest.raises(InputError, match=r"float\.onnx is not quantized"):
        requantize(tmp_path / "float.onnx", "int8:tensor", out)
    with pytest.raises(InputError, match=r"node '.*' is a QLinear\w+; models in the QDQ form"):
        requantize(quantized(QuantFormat.QOperator), "int8:tensor", out)
    for target in ("int8:token", "nf4:g64", "int8:channel:asym", "int3:channel"):
        with pytest.raises(InputError, match="expected a target such as"):
            requantize(quantized(), target, out)
    with pytest.raises(SpecError, match="unknown token 'pow3'; did you mean 'pow2'"):
        requantize(quantized(), "int8:tensor:pow3", out)
    with pytest.raises(InputError, match=r"expected a new file ending in \.onnx"):
        requantize(quantized(), "int8:tensor", quantized())
    assert not out.exists()


def test_a_computed_scale_names_its_node(quantized: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(quantized())
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    node.name = "odd one"
    model.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed"]))
    next(node for node in model.graph.node if node.name == "odd one").input[1] = "computed"
    onnx.save(model, str(tmp_path / "odd.onnx"))
    with pytest.raises(InputError, match="node 'odd one' has a scale or zero-point that is computed"):
        requantize(tmp_path / "odd.onnx", "int8:tensor", tmp_path / "out.onnx")
