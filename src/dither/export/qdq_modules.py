"""Quantized modules as QuantizeLinear and DequantizeLinear around operators; their own maths outside of an export.

Codes are int8 (uint8 for activations, clipped where they have fewer bits), so that ONNX Runtime turns the pattern into
integer kernels. A quantizer that is no uniform grid stays as it is and is traced as explicit maths.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dither.export.integers import IntegerWeight
from dither.formats.grid import highest_code, lowest_code
from dither.formats.spec import QuantSpec
from dither.nn.activation import ActivationQuantizer
from dither.nn.attention import AttentionOperands
from dither.nn.linear import ConvGeometry, QuantizedConv2d, QuantizedLinear

CONTAINER = 8  # bits of a code of activations
CODES = "codes"  # buffer that holds a layer's weight; the exported tensor is named by it


def integer_grid(quantizer: ActivationQuantizer) -> bool:
    """Whether a quantizer is a fixed uniform grid with a zero-point among its codes, up to rounding it."""
    spec = quantizer.spec
    if spec.kind != "int" or spec.dynamic or spec.zero_point == "real" or spec.granularity not in ("tensor", "channel"):
        return False
    zero = quantizer.zero_point.round()
    return bool((zero >= 0).all()) and bool((zero <= 2**CONTAINER - 1).all())


class QdqActivation(nn.Module):
    """A quantizer of activations as QuantizeLinear and DequantizeLinear with uint8 codes.

    A fractional zero-point, which reparameterization leaves, is rounded; that moves only what is clipped.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        spec, scale, zero = quantizer.spec, quantizer.scale.float(), quantizer.zero_point.round()
        self.clips = spec.bits < CONTAINER or lowest_code(spec) > 0
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero.expand_as(scale).to(torch.uint8).clone())
        self.register_buffer("low", scale * (lowest_code(spec) - zero))
        self.register_buffer("high", scale * (highest_code(spec) - zero))

    @property
    def spec(self) -> QuantSpec:
        """As the quantizer's."""
        return self.quantizer.spec

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """x on the grid."""
        if not torch.compiler.is_exporting():
            quantized: Tensor = self.quantizer(x)
            return quantized
        if self.clips:
            x = torch.clamp(x, self.low, self.high)
        attributes: dict[str, Any] = {"axis": x.ndim - 1} if self.scale.ndim else {}
        parts = [self.scale, self.zero_point]
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", [x, *parts], attributes, dtype=torch.uint8, shape=x.shape, version=21
        )
        real: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", [codes, *parts], attributes, dtype=torch.float32, shape=x.shape, version=21
        )
        return real


class _QdqLayer(nn.Module):
    """Codes [*] in int8 with their scale and zero-point along one axis, a bias, and what quantizes the input."""

    codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, weight: IntegerWeight, layer: QuantizedLinear | QuantizedConv2d) -> None:
        super().__init__()
        self.layer = layer
        middle = 2 ** (weight.bits - 1)
        self.signed = (weight.codes.short() - middle).to(torch.int8)
        scale, zero = weight.scale[:, 0], (weight.zero_point[:, 0] - middle).to(torch.int8)
        self.register_buffer("weight_scale", scale.float().clone())
        self.register_buffer("weight_zero_point", zero.clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.float(), requires_grad=False)
        self.input_quantizer: nn.Module | None = layer.input_quantizer  # replaced afterwards, as every quantizer is

    @property
    def weight(self) -> Tensor:
        """What models look at for its dtype and device."""
        return self.weight_scale

    def dequantized(self, axis: int) -> Tensor:
        real: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", [self.codes, self.weight_scale, self.weight_zero_point], {"axis": axis},
            dtype=torch.float32, shape=self.codes.shape, version=21,
        )  # fmt: skip
        return real

    def quantized(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QdqLinear(_QdqLayer):
    """A linear layer as a product with a dequantized matrix [i, o].

    Rows of a plain matrix are multiplied by Gemm, whose integer kernel takes a bias in steps of its accumulator.
    """

    bias_codes: Tensor | None
    bias_scale: Tensor

    def __init__(self, weight: IntegerWeight, layer: QuantizedLinear) -> None:
        super().__init__(weight, layer)
        self.register_buffer(CODES, self.signed.T.contiguous())
        self.register_buffer("bias_codes", None)

    def set_bias_codes(self) -> None:
        """Derive an int32 bias from the scales of input and weight, where those are one a tensor and one a row."""
        quantizer = self.input_quantizer
        if self.bias is None or not isinstance(quantizer, QdqActivation) or quantizer.scale.ndim > 0:
            return
        scale = (quantizer.scale.double() * self.weight_scale.double()).float()
        codes = torch.round(self.bias.double() / scale.double())
        if float(codes.abs().max()) < 2**31:
            self.register_buffer("bias_codes", codes.to(torch.int32))
            self.register_buffer("bias_scale", scale)

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """As torch.nn.Linear."""
        if not torch.compiler.is_exporting():
            found: Tensor = self.layer(input)
            return found
        if input.ndim == 2 and self.bias_codes is not None:
            zero = torch.zeros_like(self.bias_codes)
            bias: Tensor = torch.onnx.ops.symbolic(
                "DequantizeLinear", [self.bias_codes, self.bias_scale, zero], {"axis": 0},
                dtype=torch.float32, shape=self.bias_codes.shape, version=21,
            )  # fmt: skip
            return torch.addmm(bias, self.quantized(input), self.dequantized(axis=1))
        y = self.quantized(input) @ self.dequantized(axis=1)
        return y if self.bias is None else y + self.bias


class QdqConv2d(_QdqLayer):
    """A convolution with a dequantized kernel [o, c / groups, h, w]."""

    def __init__(self, weight: IntegerWeight, layer: QuantizedConv2d) -> None:
        super().__init__(weight, layer)
        self.geometry: ConvGeometry = layer.geometry
        self.register_buffer(CODES, self.signed.reshape(len(self.signed), -1, *self.geometry.kernel).contiguous())
        for name in ("kernel_size", "stride", "dilation", "groups", "padding_mode", "padding"):
            setattr(self, name, getattr(layer, name))  # models compute paddings from these

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o y x"]:
        """As torch.nn.Conv2d."""
        if not torch.compiler.is_exporting():
            found: Tensor = self.layer(input)
            return found
        x, padding = self.geometry.pad(self.quantized(input))
        geometry, kernel = self.geometry, self.dequantized(axis=0)
        return functional.conv2d(x, kernel, self.bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def as_qdq(model: nn.Module, weights: dict[str, IntegerWeight]) -> dict[str, ActivationQuantizer]:
    """Replace every quantized module in place; returns the quantizers that stay explicit maths, by module name."""
    explicit = {}
    for name, weight in weights.items():
        layer, (holder, _, leaf) = model.get_submodule(name), name.rpartition(".")
        kind = QdqConv2d(weight, layer) if isinstance(layer, QuantizedConv2d) else QdqLinear(weight, layer)  # type: ignore[arg-type]
        setattr(model.get_submodule(holder), leaf, kind)
    for name, module in list(model.named_modules()):
        if isinstance(module, _QdqLayer | AttentionOperands):
            for key, quantizer in list(module.named_children()):
                if isinstance(quantizer, ActivationQuantizer):
                    if integer_grid(quantizer):
                        setattr(module, key, QdqActivation(quantizer))
                    else:
                        explicit[f"{name}.{key}"] = quantizer
        if isinstance(module, QdqLinear):
            module.set_bias_codes()
    return explicit
