"""onnx-qdq: integer kernels of ONNX Runtime over our codes, with the answers of the simulated network."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tests.cli.conftest import PROCESSOR, noise_pictures

import dither
from dither.data import load_processor, open_images
from dither.errors import InputError, SpecError, StorageError
from dither.export.graph import Graph
from dither.export.qdq import integer_kernels, relative_difference
from dither.export.qdq_reader import read_weight
from dither.export.qdq_widths import narrow, nibbles
from dither.export.sessions import open_session
from dither.export.tracing import run_graph

qdq, qdq_lowering = import_module("dither.export.qdq"), import_module("dither.export.qdq_lowering")
qdq_sums = import_module("dither.export.qdq_sums")
Tinies = Callable[..., Any]


def saved(tiny: Any, folder: Path, size: int, **choices: Any) -> dither.Result:
    """The tiny network as a folder with a processor, quantized."""
    tiny.model.save_pretrained(folder)
    processor = PROCESSOR | {"size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    method = dither.RTN(**{"weights": "int8:channel:sym", "activations": "int8:tensor", **choices})
    return dither.quantize(folder, method, tiny.batch(4))


def answers(folder: Path, batch: torch.Tensor) -> Any:
    """The logits of ONNX Runtime."""
    return run_graph(open_session(folder / "model.onnx"), {"pixel_values": batch})


@pytest.mark.slow
def test_a_transformer_runs_with_integers_and_gives_the_same_logits(tiny: Tinies, tmp_path: Path) -> None:
    network = tiny("ViTForImageClassification", num_hidden_layers=1)
    result = saved(network, tmp_path / "vit", 16, probabilities="logsqrt2-4:tensor")
    pictures = noise_pictures(tmp_path / "pictures", seed=0, count=6) / "cat"
    report = dither.export(result, "onnx-qdq", tmp_path / "onnx", data=pictures)
    assert report["pictures"]["count"] == 3 and report["pictures"]["top1"] is None
    assert report["pictures"]["largest_difference"] < 0.3 and report["pictures"]["agreement"] >= 2 / 3
    kernels = integer_kernels(tmp_path / "onnx" / "model.onnx")
    assert sum(kernels.values()) == 8, kernels  # 6 in the block, query times key, the head
    assert report["largest_change"] < 1e-6
    assert any("explicit maths in floats: 1 quantizers of logsqrt2-4" in note for note in report["notes"])
    batch = network.batch(6, seed=3)
    assert relative_difference(answers(tmp_path / "onnx", batch), network.logits(batch, result.model).numpy()) < 0.05


@pytest.mark.slow
def test_a_convolutional_network_with_folded_norms(tiny: Tinies, tmp_path: Path) -> None:
    """Four-bit weights take four bits; convolutions in front of a quantizer become QLinearConv."""
    network = tiny("ResNetForImageClassification")
    result = saved(network, tmp_path / "resnet", 32, weights="int4:channel:sym")
    report = dither.export(result, "onnx-qdq", tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    kinds = [tensor.data_type for tensor in graph.initializer]
    assert (kinds.count(TensorProto.INT4), kinds.count(TensorProto.UINT4)) == (6, 5)
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)
    kernels = integer_kernels(tmp_path / "onnx" / "model.onnx")
    assert kernels == {"QLinearConv": 4, "ConvInteger": 5, "QGemm": 1}
    assert any("its input is not quantized" in note for note in report["notes"])
    batch = network.batch(6, seed=3)
    assert relative_difference(answers(tmp_path / "onnx", batch), network.logits(batch, result.model).numpy()) < 0.05


@pytest.mark.slow
def test_residual_sums_are_integers_where_pictures_give_them_ranges(tiny: Tinies, tmp_path: Path) -> None:
    network = tiny("ResNetForImageClassification")
    result = saved(network, tmp_path / "resnet", 32)
    pictures = noise_pictures(tmp_path / "pictures", seed=1, count=8)
    plain = dither.export(result, "onnx-qdq", tmp_path / "plain")
    report = dither.export(result, "onnx-qdq", tmp_path / "sums", calibration=pictures)
    assert integer_kernels(tmp_path / "sums" / "model.onnx") == {"QLinearConv": 9, "QGemm": 1}
    assert report["exact_layers"] >= plain["exact_layers"]
    assert any("residual sums of convolutions have ranges" in note for note in report["notes"])
    assert any("session.x64quantprecision=1" in note for note in report["notes"])
    for folder in ("plain", "sums"):  # ONNX Runtime refuses shared ones where it copies weights to uint8
        graph = Graph(onnx.load(str(tmp_path / folder / "model.onnx")).graph)
        zeros = [node.input[2] for node in graph.of_type("DequantizeLinear") if node.input[0] in graph.constants]
        assert len(set(zeros)) == len(zeros) > 4
    batch = next(open_images(pictures).pixel_batches(load_processor(tmp_path / "resnet"), 8))
    assert relative_difference(answers(tmp_path / "sums", batch), answers(tmp_path / "plain", batch)) < 0.1
    with pytest.raises(InputError, match="gives ranges to the sums"):
        dither.export(result, "dequantized", tmp_path / "other", calibration=pictures)


@pytest.mark.parametrize("late", [False, True])
def test_a_sum_reads_the_codes_of_another_layer_and_gives_a_convolution_a_range(late: bool) -> None:
    """x and a convolution of it meet in a sum whose rectified output two layers quantize alike.

    The layer that quantizes x stands before the sum, or only `late` behind it.
    """
    draw = np.random.default_rng(0)
    parts = {"scale": np.float32(0.04), "zero": np.uint8(128), "kernel": draw.normal(size=(3, 3, 1, 1)),
             "step": np.float32(0.05), "none": np.uint8(0)}  # fmt: skip
    node = helper.make_node
    quantizer = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        node("DequantizeLinear", ["codes", "scale", "zero"], ["real"]),
    ]
    nodes = [
        *([] if late else quantizer),
        node("Conv", ["x" if late else "real", "kernel"], ["y"]),
        node("Add", ["y", "x"], ["sum"]),
        node("Relu", ["sum"], ["out"]),
        *(part for n in "ab" for part in (
            node("QuantizeLinear", ["out", "step", "none"], [f"codes_{n}"]),
            node("DequantizeLinear", [f"codes_{n}", "step", "none"], [f"real_{n}"]),
        )),
        node("Mul", ["real_a", "real_b"], ["product"]),
        *(quantizer if late else []),
        node("Add", ["product", "real"], ["square"]),
    ]  # fmt: skip
    shape = ["n", 3, 4, 4]
    graph = helper.make_graph(
        nodes, "sums", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("square", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(v, v.dtype if v.dtype == np.uint8 else np.float32), k)
         for k, v in parts.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(model: onnx.ModelProto) -> Any:
        return open_session(model).run(None, {"x": x.numpy()})[0]

    before = run(model)
    assert qdq_sums.quantize_sums(model, [x[:32], x[32:]]) == 1
    view = Graph(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert list(view.of_type("Add")[0].input) == ["y.sum_real", "real"]
    assert len(view.of_type("QuantizeLinear")) == 3  # of x, of the convolution, and one for both readers
    assert relative_difference(run(model).reshape(64, -1), before.reshape(64, -1)) < 0.05


def test_padding_norms_and_rectifiers_go_into_the_convolution() -> None:
    """A padded depthwise convolution with a norm of negative gains, ReLU6 and quantizers of 8 and 4 bits around it."""
    draw = np.random.default_rng(0)
    parts = {
        "edges": np.array([0, 0, 0, 0, 0, 0, 1, 1]), "low": np.float32(0), "high": np.float32(1.5),
        "six": np.float32(6),
        "s": np.float32(0.1), "z": np.uint8(0), "t": np.float32(0.02), "codes": draw.integers(-8, 8, (4, 1, 3, 3)),
        "ws": draw.random(4) * 0.1, "wz": np.zeros(4), "gain": draw.standard_normal(4), "shift": draw.random(4),
        "mean": draw.random(4), "variance": draw.random(4) + 0.5,
    }  # fmt: skip
    kinds = {"edges": np.int64, "z": np.uint8, "codes": np.int8, "wz": np.int8}
    constants = [numpy_helper.from_array(np.asarray(x, kinds.get(name, np.float32)), name) for name, x in parts.items()]
    nodes = [
        helper.make_node("Pad", ["x", "edges"], ["p"]),
        helper.make_node("Clip", ["p", "low", "high"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["codes", "ws", "wz"], ["w"], axis=0),
        helper.make_node("Conv", ["d", "w"], ["y"], group=4, strides=[2, 2]),
        helper.make_node("BatchNormalization", ["y", "gain", "shift", "mean", "variance"], ["n"]),
        helper.make_node("Clip", ["n", "low", "six"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "t", "z"], ["o"]),
        helper.make_node("DequantizeLinear", ["o", "t", "z"], ["logits"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4, None, None]) for name in ("x", "logits")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
    before = open_session(model).run(None, {"x": x.numpy()})[0]
    lowered = qdq_lowering.lower(model)
    assert [node.op_type for node in model.graph.node].count("Pad") == 0
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 0
    assert list(lowered.factors) == ["codes"] and lowered.in_floats == {}
    after = open_session(model).run(None, {"x": x.numpy()})[0]
    assert np.abs(after - before).max() < 0.021  # a step of the output, where the bias was rounded
    assert np.abs(after - before).mean() < 0.001


def test_what_integers_cannot_hold_is_refused_with_the_reason(tiny: Tinies, tmp_path: Path) -> None:
    network = tiny("ViTForImageClassification", num_hidden_layers=1)
    cases: dict[str, dict[str, str]] = {
        "it has 4, 5, 6, 7, 8 bits": {"weights": "int3:channel:sym"},
        "groups of 16 columns: integer products have one scale a row": {"weights": "int4:g16:sym"},
        "no range that is measured at each call": {"activations": "int8:token"},
    }
    for reason, choices in cases.items():
        method = dither.RTN(**{"weights": "int8:channel:sym", "activations": "int8:tensor", **choices})
        result = dither.quantize(network.model, method, network.batch(2))
        with pytest.raises((SpecError, InputError), match=reason):
            dither.export(result, "onnx-qdq", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_found(
    tiny: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny("ResNetForImageClassification", depths=[1, 1])
    result = saved(network, tmp_path / "resnet", 32)

    def spoiled(model: onnx.ModelProto, layers: object) -> None:
        graph = Graph(model.graph)
        name = next(name for name in graph.constants if name.startswith("model.classifier") and name.endswith("codes"))
        graph.constant(name, -graph.values([name])[0])

    monkeypatch.setattr(qdq, "narrow", spoiled)
    with pytest.raises(StorageError, match="logits are off by"):
        dither.export(result, "onnx-qdq", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_two_codes_share_a_byte_and_are_read_back_with_their_signs() -> None:
    codes = np.array([[-8, 7, -1], [0, 3, -4]], dtype=np.int8)
    assert nibbles(codes) == bytes([0x78, 0x0F, 0xC3])
    scale, zero = np.array([0.5, 2.0], dtype=np.float32), np.array([0, 1], dtype=np.int8)
    parts = {"model.a.codes": codes, "s": scale, "z": zero}
    node = helper.make_node("DequantizeLinear", list(parts), ["y"], axis=0)
    graph = helper.make_graph([node], "g", [], [], [numpy_helper.from_array(x, name) for name, x in parts.items()])
    model = helper.make_model(graph)
    narrow(model, {"a"})
    expected = scale[:, None] * (codes - zero[:, None])
    assert np.array_equal(read_weight(model, "a", None), expected)
    assert np.array_equal(read_weight(model, "a", np.array([2.0, -1.0])), expected / [[2.0], [-1.0]])
    assert Graph(model.graph).producer["model.a.codes.wide"].op_type == "Cast"
    with pytest.raises(StorageError, match="b was written, but its codes are not in the graph"):
        read_weight(model, "b", None)
