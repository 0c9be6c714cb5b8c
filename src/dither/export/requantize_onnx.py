"""Re-quantization of an ONNX model in the QDQ form: new grids for weights and activations, biases that keep the means.

No data is needed: ranges come with the model. What the inputs of its layers are on average is measured by running the
source itself on pictures with the spectrum of natural ones, drawn in the range of its input; calibration pictures do it
where there are any. Layers are corrected in order, each seeing what the earlier ones have become.

Source: Kapur et al., MRQ, arXiv 2308.01867; see `dither.transforms.requantize`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from jaxtyping import Float
from onnx import TensorProto, helper

from dither.errors import InputError
from dither.export.graph import Array, Graph
from dither.export.quantized_graph import ActivationNode, LayerNode, activations, layers, real, scheme
from dither.export.sessions import open_session
from dither.formats.spec import QuantSpec
from dither.transforms.requantize import activation_scale, folded_bias, highest, weight_codes, weight_scale

_INT32 = 2**31 - 1
_NARROW = (TensorProto.INT4, TensorProto.UINT4)
_CODES = (TensorProto.INT8, TensorProto.UINT8)
RANGE = (-2.0, 2.0)  # of pictures that are normalized by their mean and standard deviation
Pixels = Float[np.ndarray, "b c h w"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Parts:
    """Which of MRQ's two parts are used, and whether activations without negative values stay unsigned."""

    correct_weights: bool = True
    fold_errors: bool = True
    unsigned: bool = True


@dataclass(frozen=True)
class Means:
    """E[x] and E[x²] of each input channel of a layer."""

    first: Float[np.ndarray, " c"]
    second: Float[np.ndarray, " c"]


def check_target(spec: QuantSpec) -> None:
    """Whether a scheme can be a target.

    Raises:
        InputError: it is no symmetric scheme of 8 bits, or of fewer that int8 holds.
    """
    plain = spec.kind == "int" and spec.granularity in ("tensor", "channel") and not (spec.dynamic or spec.dual)
    if not plain or spec.symmetry != "sym" or not 4 <= spec.bits <= 8:
        raise InputError(
            "expected a target such as int8:tensor, int8:channel or int8:tensor:pow2 (symmetric, 4 to 8 bits), "
            f"got {spec}"
        )


def requantized(
    source: onnx.ModelProto, spec: QuantSpec, pixels: Pixels, parts: Parts, progress: Progress | None = None
) -> tuple[onnx.ModelProto, list[str]]:
    """The model in the target scheme, and remarks on what could not be done.

    Raises:
        InputError: a node quantizes in a way that is not known; the message names it.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    _forget_types(model)
    graph, remarks, without_bias = Graph(model.graph), list[str](), list[str]()
    found = list(layers(graph))
    names = {layer.name: layer.node.input[0] for layer in found}
    means = measured(source, names, pixels, {layer.name: layer.node.op_type for layer in found})
    weights = {layer.name: real(graph, layer.weight) for layer in found}
    biases = {layer.name: _bias(graph, layer) for layer in found}
    for quantizer in list(activations(graph)):
        _change_activation(graph, quantizer, spec, parts.unsigned)
    stored = {layer.name: _change_weight(graph, layer, weights[layer.name], means, spec, parts) for layer in found}
    _change_constants(graph, found)
    _lower_opset(graph, model)
    for number, layer in enumerate(found):
        name, bias = layer.name, biases[layer.name]
        if bias is None and parts.fold_errors and layer.node.op_type == "MatMul":
            without_bias.append(name)
            continue
        if bias is not None or parts.fold_errors:
            rows = _rows(weights[name], layer.axis), _rows(stored[name], layer.axis)
            bias = np.zeros(len(rows[0])) if bias is None else bias
            if parts.fold_errors:
                kind = {name: layer.node.op_type}
                seen = measured(model, {name: layer.node.input[0]}, pixels, kind)[name]
                each = [_per_column(layer, rows[0].shape, one.first) for one in (means[name], seen)]
                bias = folded_bias(*(torch.from_numpy(part) for part in (bias, *rows, *each))).numpy()
            _store_bias(graph, layer, bias, remarks)
        if progress is not None:
            progress(name, number + 1, len(found))
    if without_bias:
        remarks.append(f"no bias to fold rounding errors into: {', '.join(without_bias)}")
    graph.remove_unused()
    onnx.checker.check_model(model)
    return model, remarks


def _forget_types(model: onnx.ModelProto) -> None:
    """Drop what a model notes of the types of its codes: they change, and whoever runs it infers them."""
    kept = [one for one in model.graph.value_info if one.type.tensor_type.elem_type not in _CODES]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def _lower_opset(graph: Graph, model: onnx.ModelProto) -> None:
    """From opset 21 to 20, which holds all codes that are left: ONNX Runtime cannot open int8 codes that are transposed
    in a graph of 21, as its passes from int8 to uint8 contradict themselves there.
    """
    graph.remove_unused()
    narrow = any(tensor.data_type in _NARROW for tensor in model.graph.initializer)
    for one in model.opset_import:
        if one.domain == "" and one.version == 21 and not narrow and not graph.of_type("GroupNormalization"):
            one.version = 20


def pictures_like_nature(shape: tuple[int, int, int, int], low: float, high: float) -> Pixels:
    """Noise whose amplitudes fall with frequency as those of natural pictures do, within [low, high]."""
    draw = np.random.default_rng(0)
    _, _, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    spectrum = np.fft.rfft2(draw.standard_normal(shape)) / frequency
    field = np.fft.irfft2(spectrum, s=(height, width))
    field /= field.std(axis=(1, 2, 3), keepdims=True)
    middle, spread = (high + low) / 2, (high - low) / 4
    return np.clip(middle + spread * field, low, high).astype(np.float32)


def input_range(model: onnx.ModelProto) -> tuple[float, float]:
    """The range in which the model quantizes its input; one of standard deviations where it does not."""
    graph = Graph(model.graph)
    entry = model.graph.input[0].name
    for quantizer in activations(graph):
        if quantizer.node.input[0] == entry:
            return quantizer.low, quantizer.high
    return RANGE


def measured(
    model: onnx.ModelProto, tensors: Mapping[str, str], pixels: Pixels, kinds: Mapping[str, str]
) -> dict[str, Means]:
    """Means of the inputs of layers, by layer; channels are axis 1 of pictures and the last axis otherwise."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    wanted = list(dict.fromkeys(tensors.values()))
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    Graph(probe.graph).remove_unused()
    session = open_session(probe)
    values = dict(zip(wanted, session.run(wanted, {model.graph.input[0].name: pixels}), strict=True))
    found = {}
    for layer, name in tensors.items():
        x = values[name].astype(np.float64)
        axes = tuple(k for k in range(x.ndim) if k != (1 if kinds[layer] == "Conv" else x.ndim - 1))
        found[layer] = Means(x.mean(axis=axes), np.square(x).mean(axis=axes))
    return found


def _rows(weight: Array, axis: int) -> Float[np.ndarray, "o i"]:
    moved = np.moveaxis(weight, axis, 0)
    return np.ascontiguousarray(moved.reshape(len(moved), -1))


def _per_column(layer: LayerNode, shape: tuple[int, int], values: Float[np.ndarray, " c"]) -> Float[np.ndarray, "r i"]:
    """A value of each input channel for each weight; a grouped convolution's rows read channels of their own."""
    group = next((one.i for one in layer.node.attribute if one.name == "group"), 1)
    inside = len(values) // group
    rows = np.repeat(values.reshape(group, inside), shape[1] // inside, axis=1)
    return rows if group == 1 else np.repeat(rows, shape[0] // group, axis=0)


def _change_activation(graph: Graph, quantizer: ActivationNode, spec: QuantSpec, unsigned: bool) -> None:
    """Give a quantizer the target's grid; what the source clipped stays clipped."""
    node, low, high = quantizer.node, quantizer.low, quantizer.high
    positive = unsigned and low >= 0
    scale = activation_scale(low, high, spec.bits, spec.power_of_two, positive)
    top = 2**spec.bits - 1 if positive else highest(spec.bits)
    bottom = 0 if positive else -top
    kind, output = np.uint8 if positive else np.int8, node.output[0]
    ends = max(low, bottom * scale), min(high, top * scale)
    limits = np.iinfo(kind)
    if ends[0] > limits.min * scale + scale / 2 or ends[1] < limits.max * scale - scale / 2:
        bounds = [graph.constant(f"{output}.{name}", np.array(end, np.float32)) for name, end in
                  zip(("low", "high"), ends, strict=True)]  # fmt: skip
        graph.insert(node, [helper.make_node("Clip", [node.input[0], *bounds], [f"{output}.clipped"])])
        graph.rename_input(node, 0, f"{output}.clipped")
    grid = [
        graph.constant(f"{output}.scale", np.array(scale, np.float32)),
        graph.constant(f"{output}.zero_point", np.array(0, kind)),
    ]
    for one in (node, *graph.readers.get(output, [])):
        if one.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            raise InputError(
                f"node {one.name or one.output[0]!r} ({one.op_type}) reads codes; only the QDQ form is known"
            )
        del one.input[1:]
        one.input.extend(grid)
        stated = [a for a in one.attribute if a.name != "output_dtype"]  # the zero-point's type says it
        del one.attribute[:]
        one.attribute.extend(stated)
    graph.refresh()


def _change_weight(
    graph: Graph, layer: LayerNode, weight: Array, means: Mapping[str, Means], spec: QuantSpec, parts: Parts
) -> Array:
    """Store a weight in the target's grid; returns the values that its codes stand for."""
    rows = torch.from_numpy(_rows(weight, layer.axis))
    importance = None
    if parts.correct_weights:
        second = _per_column(layer, (rows.shape[0], rows.shape[1]), means[layer.name].second)
        importance = torch.from_numpy(second + 1e-9 * second.mean() + 1e-30).expand_as(rows)
    cells = rows if spec.granularity == "channel" else rows.reshape(1, -1)
    weighed = None if importance is None else importance.reshape(cells.shape)
    scale = weight_scale(cells, spec.bits, spec.power_of_two, weighed).float().double()
    codes = weight_codes(cells, scale, spec.bits)
    values = (codes.double() * scale[:, None]).reshape(rows.shape).numpy()
    shape = np.moveaxis(weight, layer.axis, 0).shape
    node, name = layer.weight, f"{layer.weight.output[0]}.codes"
    stored = np.moveaxis(codes.reshape(rows.shape).numpy().reshape(shape), 0, layer.axis)
    step = scale.float().numpy() if spec.granularity == "channel" else scale.float().numpy().reshape(())
    del node.input[:]
    node.input.extend([
        graph.constant(name, stored), graph.constant(f"{node.output[0]}.scale", step),
        graph.constant(f"{node.output[0]}.zero_point", np.zeros(step.shape, np.int8)),
    ])  # fmt: skip
    _set_axis(node, layer.axis)
    graph.refresh()
    return np.moveaxis(values.reshape(shape), 0, layer.axis)


def _set_axis(node: onnx.NodeProto, axis: int) -> None:
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", axis))


def _change_constants(graph: Graph, found: list[LayerNode]) -> None:
    """Other constants of 8 bits, such as a factor: their zero-points go, in the source's steps or coarser ones."""
    known = {layer.weight.output[0] for layer in found} | {one.bias.output[0] for one in found if one.bias is not None}
    for node in graph.of_type("DequantizeLinear"):
        if node.output[0] in known or node.input[0] not in graph.constants or scheme(graph, node)[1].dtype == np.int32:
            continue
        values = real(graph, node)
        scale = np.array(max(float(np.abs(values).max()) / 127, 2.0**-60), np.float32)
        parts: dict[str, Array] = {
            "codes": np.rint(values / scale).astype(np.int8),
            "scale": scale,
            "zero_point": np.zeros((), np.int8),
        }
        del node.input[:]
        node.input.extend([graph.constant(f"{node.output[0]}.{key}", value) for key, value in parts.items()])
        graph.refresh()


def _bias(graph: Graph, layer: LayerNode) -> Array | None:
    """The exact bias of a layer, in float64; None where it has none.

    Raises:
        InputError: it is computed.
    """
    if layer.bias is not None:
        return real(graph, layer.bias)
    if len(layer.node.input) < 3 or not layer.node.input[2]:
        return None
    value = graph.value(layer.node.input[2])
    if value is None:
        raise InputError(f"node {layer.name!r} has a bias that is computed; only constants can be requantized")
    return value.astype(np.float64)


def _store_bias(graph: Graph, layer: LayerNode, bias: Array, remarks: list[str]) -> None:
    """Write a bias in steps of the accumulator, or in floats where 32 bits do not hold it."""
    read = graph.made_by(layer.node.input[0], "DequantizeLinear")
    base = f"{layer.node.output[0]}.bias"
    if read is None:
        name = graph.constant(base, bias.astype(np.float32))
    else:
        step = scheme(graph, read)[0].astype(np.float64) * scheme(graph, layer.weight)[0].astype(np.float64)
        unit = np.broadcast_to(step.reshape(-1), bias.shape).astype(np.float32)
        codes = np.rint(bias / unit.astype(np.float64))
        if np.abs(codes).max() > _INT32:
            remarks.append(f"{layer.name}: its bias does not fit into 32 bits and stays in floats")
            name = graph.constant(base, bias.astype(np.float32))
        else:
            parts = [
                graph.constant(f"{base}.codes", codes.astype(np.int32)), graph.constant(f"{base}.scale", unit),
                graph.constant(f"{base}.zero_point", np.zeros(len(codes), np.int32)),
            ]  # fmt: skip
            name = f"{base}.real"
            graph.insert(layer.node, [helper.make_node("DequantizeLinear", parts, [name], axis=0)])
    del layer.node.input[2:]
    layer.node.input.append(name)
    graph.refresh()
