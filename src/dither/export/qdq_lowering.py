"""Passes that bring a traced graph of QuantizeLinear and DequantizeLinear into the shape of integer kernels.

Batch normalization behind a convolution goes into its scales and bias, padding before a quantizer into the convolution,
biases become int32. A convolution whose output is not quantized becomes ConvInteger and a product with its scales.
None of this changes what is computed beyond the rounding of biases to a step of the accumulator.

Source: ONNX operators, opset 21; which patterns ONNX Runtime fuses: its QDQ transformers, read in 2026.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
from jaxtyping import Float
from onnx import TensorProto, helper

from dither.export.graph import Graph, attributes, set_attribute

Channels = Float[np.ndarray, " o"]
_INT32 = 2**31 - 1


@dataclass
class Lowered:
    """What was done: the factor that each folded kernel's rows were multiplied by, and why layers stay in floats."""

    factors: dict[str, Channels] = field(default_factory=dict)  # name of the codes → per output channel
    in_floats: dict[str, str] = field(default_factory=dict)  # name of the codes → reason


def lower(model: onnx.ModelProto) -> Lowered:
    """Apply all passes, in place."""
    graph, lowered = Graph(model.graph), Lowered()
    for conv in graph.of_type("Conv"):
        weight = _weight(graph, conv)
        if weight is not None:
            _take_padding(graph, conv)
            _fold_norm(graph, conv, weight, lowered)
    for conv in graph.of_type("Conv"):
        weight = _weight(graph, conv)
        if weight is not None:
            _to_integers(graph, conv, weight, lowered)
    graph.remove_unused()
    return lowered


def _weight(graph: Graph, conv: onnx.NodeProto) -> onnx.NodeProto | None:
    """The DequantizeLinear of a convolution's constant kernel."""
    node = graph.made_by(conv.input[1], "DequantizeLinear")
    return node if node is not None and node.input[0] in graph.constants else None


def _take_padding(graph: Graph, conv: onnx.NodeProto) -> None:
    """Let a convolution pad by itself what is padded with zeros before or behind its quantizer."""
    behind = graph.made_by(conv.input[0], "Pad")
    edges = None if behind is None else _edges(graph, behind)
    if behind is not None and edges is not None and graph.made_by(behind.input[0], "DequantizeLinear"):
        _pad(conv, edges)
        graph.rename_input(conv, 0, behind.input[0])
    first = _quantizer_alone(graph, conv)
    before = None if first is None else graph.made_by(first.input[0], "Pad")
    edges = None if before is None else _edges(graph, before)
    if first is not None and before is not None and edges is not None:
        _pad(conv, edges)
        graph.rename_input(first, 0, before.input[0])


def _quantizer_alone(graph: Graph, conv: onnx.NodeProto) -> onnx.NodeProto | None:
    """The first node of what quantizes a convolution's input; None where others read it too."""
    dequantize = graph.made_by(conv.input[0], "DequantizeLinear")
    quantize = None if dequantize is None else graph.made_by(dequantize.input[0], "QuantizeLinear")
    if dequantize is None or quantize is None:
        return None
    clip = graph.made_by(quantize.input[0], "Clip")
    clip = clip if clip is not None and clip.input[0] in graph.producer and _holds_zero(graph, clip) else None
    chain = [part for part in (clip, quantize, dequantize) if part is not None]
    return chain[0] if all(graph.only_reader(part.output[0]) is not None for part in chain) else None


def _holds_zero(graph: Graph, clip: onnx.NodeProto) -> bool:
    """Whether a clip holds zero, so that padding may come behind it."""
    low, high = (graph.value(name) for name in clip.input[1:3])
    return low is not None and high is not None and bool(low <= 0 <= high)


def _edges(graph: Graph, pad: onnx.NodeProto) -> list[int] | None:
    """[top, left, bottom, right] of a padding with zeros of pictures; None for another."""
    widths = graph.value(pad.input[1])
    fill = graph.value(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
    constant = attributes(pad).get("mode", b"constant") == b"constant"
    if widths is None or fill is None or float(fill) != 0 or not constant or widths.size != 8:
        return None
    top, left, bottom, right = (int(widths[k]) for k in (2, 3, 6, 7))
    return None if any(widths[[0, 1, 4, 5]]) or min(top, left, bottom, right) < 0 else [top, left, bottom, right]


def _pad(conv: onnx.NodeProto, edges: list[int]) -> None:
    own = attributes(conv).get("pads", [0, 0, 0, 0])
    set_attribute(conv, "pads", [one + other for one, other in zip(own, edges, strict=True)])


def _fold_norm(graph: Graph, conv: onnx.NodeProto, weight: onnx.NodeProto, lowered: Lowered) -> None:
    """Multiply the scales of a kernel by what batch normalization does behind it; its shift becomes the bias."""
    norm = graph.only_reader(conv.output[0])
    if norm is None or norm.op_type != "BatchNormalization" or graph.only_reader(weight.output[0]) is None:
        return
    known = graph.values([*norm.input[1:5], *weight.input[1:3]])
    if known is None:
        return
    gain, shift, mean, variance, scale, zero = known
    factor = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + attributes(norm).get("epsilon", 1e-5))
    bias = graph.value(conv.input[2]) if len(conv.input) > 2 else np.zeros_like(mean)
    if bias is None or not np.isfinite(factor).all() or not factor.all():
        return  # a channel that is switched off has no scale
    name = weight.input[0]
    folded = (np.broadcast_to(scale, factor.shape) * factor).astype(np.float32)
    weight.input[1] = graph.constant(f"{name}.scale", folded)
    weight.input[2] = graph.constant(f"{name}.zero_point", np.broadcast_to(zero, factor.shape))
    set_attribute(weight, "axis", 0)
    new = ((bias - mean) * factor + shift).astype(np.float32)
    del conv.input[2:]
    conv.input.append(graph.constant(f"{name}.bias", new))
    output = norm.output[0]
    graph.remove(norm)
    conv.output[0] = output
    graph.refresh()
    lowered.factors[name] = factor


def _to_integers(graph: Graph, conv: onnx.NodeProto, weight: onnx.NodeProto, lowered: Lowered) -> None:
    """Give a convolution what the kernels ask for, or note why it stays in floats."""
    name = weight.input[0]
    zero = graph.value(weight.input[2])
    read = graph.made_by(conv.input[0], "DequantizeLinear")
    ranges = None if read is None else graph.values(read.input[1:3])
    if read is None or ranges is None or any(part.ndim for part in ranges):
        lowered.in_floats[name] = "its input is not quantized with one scale"
    elif zero is None or zero.min() != zero.max():
        lowered.in_floats[name] = "a kernel needs one zero-point for all outputs; use a symmetric format"
    elif _output_is_quantized(graph, conv):
        _bias_to_int32(graph, conv, weight, float(ranges[0]), lowered)
    elif attributes(conv).get("group", 1) == 1:
        _to_conv_integer(graph, conv, weight, read)
    else:
        lowered.in_floats[name] = "it is grouped and its output is not quantized directly"


def _output_is_quantized(graph: Graph, conv: onnx.NodeProto) -> bool:
    """Whether the output goes into one quantizer, at most through a rectifier which that quantizer does as well."""
    reader = graph.only_reader(conv.output[0])
    if reader is None:
        return False
    if reader.op_type == "QuantizeLinear":
        return True
    behind = graph.only_reader(reader.output[0])
    if behind is None or behind.op_type != "QuantizeLinear":
        return False
    scale, zero = (graph.value(name) for name in behind.input[1:3])
    if scale is None or zero is None or scale.ndim:
        return False
    low, high = float(scale) * (0 - int(zero)), float(scale) * (255 - int(zero))
    if reader.op_type == "Relu":
        return low >= 0
    bounds = graph.values(reader.input[1:3]) if reader.op_type == "Clip" else None
    return bounds is not None and len(bounds) == 2 and bool(bounds[0] <= low and high <= bounds[1])


def _bias_to_int32(graph: Graph, conv: onnx.NodeProto, weight: onnx.NodeProto, step: float, lowered: Lowered) -> None:
    if len(conv.input) < 3 or not conv.input[2]:
        return
    bias, scale, name = graph.value(conv.input[2]), graph.value(weight.input[1]), weight.input[0]
    if bias is None or scale is None:
        return
    unit = (np.broadcast_to(scale, bias.shape).astype(np.float64) * step).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / unit.astype(np.float64))
    if np.abs(codes).max() > _INT32:
        lowered.in_floats[name] = "its bias is too large for 32 bits"
        return
    parts = [
        graph.constant(f"{name}.bias_codes", codes.astype(np.int32)),
        graph.constant(f"{name}.bias_scale", unit),
        graph.constant(f"{name}.bias_zero_point", np.zeros(len(codes), dtype=np.int32)),
    ]
    node = helper.make_node("DequantizeLinear", parts, [f"{name}.bias_real"], axis=0)
    conv.input[2] = node.output[0]
    graph.insert(conv, [node])


def _to_conv_integer(graph: Graph, conv: onnx.NodeProto, weight: onnx.NodeProto, read: onnx.NodeProto) -> None:
    """ConvInteger takes uint8 kernels; its int32 sums times both scales are what the convolution gave."""
    name, output, inputs = weight.input[0], conv.output[0], list(conv.input)
    codes, scale, zero = (graph.value(part) for part in weight.input)
    step = graph.value(read.input[1])
    if codes is None or scale is None or zero is None or step is None:
        return
    rows = np.broadcast_to(scale, (len(codes),)).astype(np.float64) * float(step)
    shifted = (codes.astype(np.int16) + 128).astype(np.uint8)
    parts = [
        read.input[0], graph.constant(f"{name}.uint8", shifted), read.input[2],
        graph.constant(f"{name}.uint8_zero_point", np.array(int(zero.flat[0]) + 128, dtype=np.uint8)),
    ]  # fmt: skip
    integer = helper.make_node("ConvInteger", parts, [f"{output}.sums"])
    integer.attribute.extend(conv.attribute)
    factor = graph.constant(f"{name}.sum_scale", rows.astype(np.float32)[None, :, None, None])
    bias = graph.value(inputs[2]) if len(inputs) > 2 and inputs[2] else None
    nodes = [
        integer,
        helper.make_node("Cast", [f"{output}.sums"], [f"{output}.cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{output}.cast", factor], [output if bias is None else f"{output}.product"]),
    ]
    if bias is not None:
        added = graph.constant(f"{name}.bias_rows", bias[None, :, None, None])
        nodes.append(helper.make_node("Add", [f"{output}.product", added], [output]))
    graph.insert(conv, nodes)
    graph.remove(conv)
