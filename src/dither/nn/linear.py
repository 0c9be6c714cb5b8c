"""Layers that hold their weight as packed codes."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dither.errors import SpecError
from dither.formats.layout import Layout
from dither.formats.qtensor import QTensor
from dither.formats.spec import QuantSpec
from dither.nn.activation import ActivationQuantizer
from dither.nn.buffers import FixedBuffers


class PackedWeight(FixedBuffers):
    """A weight [o, i] as buffers of packed codes, scales, zero-points and whatever else its layout names.

    With `cached` set, the dequantized weight is kept after its first use: faster, for a dense copy in memory.
    """

    def __init__(self, layout: Layout) -> None:
        """An empty weight, to be filled by `of` or by a loaded state."""
        super().__init__()
        self.layout, self.cached = layout, False
        self._dense: Tensor | None = None
        for name, (size, dtype) in layout.tensors().items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype))

    @classmethod
    def of(cls, qtensor: QTensor) -> "PackedWeight":
        """The packed form of a QTensor."""
        module = cls(qtensor.layout)
        for name, part in qtensor.pack().items():
            module.register_buffer(name, part)
        return module

    @property
    def spec(self) -> QuantSpec:
        """The format of the codes."""
        return self.layout.spec

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self.layout.shape

    def qtensor(self) -> QTensor:
        """Codes and grid, outliers and correction, unpacked."""
        return QTensor.unpack(dict(self.named_buffers()), self.layout)

    def forward(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """The dequantized weight."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        dense = self.qtensor().dequantize(dtype)
        self._dense = dense if self.cached else None
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        self._dense = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{self.spec}, shape={tuple(self.shape)}"


class _Packed(nn.Module):
    """What linear and convolution layers share: packed weight, bias, input quantizer."""

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None, input_quantizer: ActivationQuantizer | None, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of the layer replaced, in which `weight` shows itself to code that asks for it."""
        super().__init__()
        self.packed, self.input_quantizer, self.dtype = packed, input_quantizer, dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        if input_quantizer is not None:
            self.register_forward_pre_hook(_be_called)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight matrix; models look at its dtype and device."""
        dense: Tensor = self.packed(self.dtype)
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Packed":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def quantize_input(self, x: Tensor) -> Tensor:
        """x as the layer sees it."""
        return x if self.input_quantizer is None else self.input_quantizer(x)


def _be_called(_module: nn.Module, _args: Any) -> None:
    """A hook that does nothing, but that it is there.

    Without hooks below it, torch's TransformerEncoderLayer multiplies by `weight` in one fused call in evaluation mode,
    and inputs would never meet their quantizers.
    """


class QuantizedLinear(_Packed):
    """y = Q(x) Ŵᵀ + b with Ŵ dequantized from packed codes."""

    @property
    def in_features(self) -> int:
        """As torch.nn.Linear's."""
        return self.packed.shape[1]

    @property
    def out_features(self) -> int:
        """As torch.nn.Linear's."""
        return self.packed.shape[0]

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:  # models may call it by this name
        """As torch.nn.Linear."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(self.quantize_input(input), self.packed(input.dtype), bias)


class QuantizedConv2d(_Packed):
    """A convolution whose kernel [o, c / groups * h * w] is dequantized from packed codes."""

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None,
        input_quantizer: ActivationQuantizer | None,
        dtype: torch.dtype,
        geometry: "ConvGeometry",
    ) -> None:
        """`input_quantizer` reads [b, c, h, w], whose last axis is no channel: one scale a tensor."""
        if input_quantizer is not None and input_quantizer.spec.granularity != "tensor":
            raise SpecError(
                f"the input of a convolution has one scale a tensor, got {input_quantizer.spec}; write "
                f"int{input_quantizer.spec.bits}:tensor, and :dynamic after it for a range of each call"
            )
        if input_quantizer is not None and input_quantizer.offset is not None:
            raise SpecError("the input of a convolution takes no offset, which its padding would not have")
        super().__init__(packed, bias, input_quantizer, dtype)
        self.geometry = geometry
        # models compute paddings from these, which they expect of a torch.nn.Conv2d
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation
        self.groups, self.padding_mode, self.padding = geometry.groups, geometry.mode, geometry.padding
        self.out_channels, patch = packed.shape
        self.in_channels = patch // (geometry.kernel[0] * geometry.kernel[1]) * geometry.groups

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o y x"]:
        """As torch.nn.Conv2d."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        x = self.quantize_input(input)
        kernel = self.packed(x.dtype).reshape(self.packed.shape[0], -1, *self.geometry.kernel)
        x, padding = self.geometry.pad(x)
        return functional.conv2d(
            x, kernel, bias, self.geometry.stride, padding, self.geometry.dilation, self.geometry.groups
        )


class ConvGeometry:
    """Kernel size, stride, padding, dilation and groups of a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.kernel, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.groups, self.mode, self.padding = conv.groups, conv.padding_mode, conv.padding
        # torch keeps (left, right, top, bottom) of 'same' and of non-zero padding in this private field
        self.edges: list[int] = list(conv._reversed_padding_repeated_twice)
        self.pads_same = pads_same(conv)

    def pad(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c y x"], tuple[int, int]]:
        """x padded where conv2d cannot do it itself, and the padding that is left to conv2d."""
        if self.pads_same:
            return functional.pad(x, [*self._same(x, 1), *self._same(x, 0)]), (0, 0)
        left, right, top, bottom = self.edges
        if self.mode == "zeros" and left == right and top == bottom:
            return x, (top, left)
        return functional.pad(x, self.edges, mode="constant" if self.mode == "zeros" else self.mode), (0, 0)

    def _same(self, x: Float[Tensor, "b c h w"], axis: int) -> tuple[int, int]:
        """Zeros before and behind a picture's axis (0: height), so that there is an output for each started stride."""
        size, stride = x.shape[2 + axis], self.stride[axis]
        reach = (-(-size // stride) - 1) * stride + self.dilation[axis] * (self.kernel[axis] - 1) + 1
        missing = max(reach - size, 0)
        return missing // 2, missing - missing // 2

    def rows(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l i"]:
        """The patches [b, positions, c * h * w] that an ungrouped convolution multiplies with its kernel rows."""
        x, padding = self.pad(x)
        patches = functional.unfold(x, self.kernel, self.dilation, padding, self.stride)
        return patches.transpose(1, 2)


def pads_same(module: nn.Module) -> bool:
    """Whether it is timm's Conv2dSame, which pads by the size of each picture, as TensorFlow's SAME does."""
    loaded = sys.modules.get("timm.layers.conv2d_same")  # whoever has such a layer has imported it
    return loaded is not None and type(module).forward is loaded.Conv2dSame.forward


def cache_weights(model: nn.Module, cached: bool = True) -> nn.Module:
    """Let every packed weight below keep its dense copy after first use (or drop it); returns the model."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.cached, module._dense = cached, None
    return model
