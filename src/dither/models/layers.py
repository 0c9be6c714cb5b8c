"""The layers that dither quantizes, each seen as a matrix [o, i] that multiplies rows of inputs.

Linear and Conv2d of torch, timm's Conv2dSame, and transformers' Conv1D (of GPT-2), a Linear whose weight is [i, o].
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.errors import NonFiniteError
from dither.formats.qtensor import QTensor
from dither.nn.activation import ActivationQuantizer
from dither.nn.experts import ExpertLinear
from dither.nn.linear import ConvGeometry, PackedWeight, QuantizedConv2d, QuantizedLinear, pads_same

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

    Layer = nn.Linear | nn.Conv2d | Conv1D
else:
    Conv1D = Layer = nn.Module  # importing transformers takes seconds, and whoever has a Conv1D has imported it

_PATCHES = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether dither can store this module's weight as codes: a layer that computes as its base class does."""
    if is_conv1d(module) or pads_same(module):
        return True
    return isinstance(module, nn.Linear | nn.Conv2d) and type(module).forward in _FORWARDS


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether it is a layer that multiplies the last axis of its input."""
    return is_layer(module) and not isinstance(module, nn.Conv2d)


def is_conv1d(module: nn.Module) -> TypeGuard[Conv1D]:
    """Whether it is transformers' Conv1D, whose weight is the transposed matrix."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    if loaded is None or not isinstance(module, loaded.Conv1D):
        return False
    return type(module).forward is loaded.Conv1D.forward


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """[o, i] of the weight as a matrix."""
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    return (columns, rows) if is_conv1d(layer) else (rows, columns)


def weight_matrix(layer: Layer, name: str) -> Float[Tensor, "o i"]:
    """The weight as a float32 matrix; a kernel's patch is one row.

    Raises:
        NonFiniteError: NaN or Inf in the weight.
    """
    weight = as_matrix(layer, layer.weight)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{name}.weight holds NaN or Inf; repair or re-download the model")
    return weight


def as_matrix(layer: Layer, x: Tensor) -> Float[Tensor, "o i"]:
    """A tensor of the shape of the layer's weight (its gradient, say) as a float32 matrix."""
    matrix = x.detach().flatten(1).float()
    return matrix.T.contiguous() if is_conv1d(layer) else matrix


def set_weight_matrix(layer: Layer, weight: Float[Tensor, "o i"], bias: Tensor | None) -> None:
    """Replace weight and bias of a full-precision layer in place; a bias is created where there was none."""
    with torch.no_grad():
        layer.weight.copy_(weight.T if is_conv1d(layer) else weight.reshape(layer.weight.shape))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)


def has_gram(layer: Layer) -> bool:
    """Whether all outputs read the same inputs; a grouped convolution's do not."""
    return not isinstance(layer, nn.Conv2d) or layer.groups == 1


def groups_of(layer: Layer) -> int:
    """How many groups of outputs read inputs of their own; 1 but for a grouped convolution."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def input_rows(layer: Layer, x: Tensor) -> Float[Tensor, "*b i"]:
    """The inputs as rows that the weight matrix multiplies: as they are, or patches of a picture."""
    return ConvGeometry(layer).rows(x) if isinstance(layer, nn.Conv2d) else x


def given_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The one tensor that a layer was called with, by position or by name."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def is_routed(layer: nn.Module) -> bool:
    """Whether a router chooses the rows of its input, so that other weights upstream make it see other rows."""
    return isinstance(layer, ExpertLinear)


def rows_alike(one: Layer, two: Layer) -> bool:
    """Whether two layers that are given the same tensor always multiply the same rows.

    Kernels may cut other patches, and what two experts were given once is by chance.
    """
    if is_routed(one) or is_routed(two):
        return False
    if isinstance(one, nn.Conv2d) and isinstance(two, nn.Conv2d):
        alike = all(getattr(one, key) == getattr(two, key) for key in _PATCHES)
        return alike and pads_same(one) == pads_same(two)
    return is_linear(one) and is_linear(two)


def quantized(
    layer: Layer, weight: QTensor, bias: Tensor | None, input_quantizer: ActivationQuantizer | None
) -> QuantizedLinear | QuantizedConv2d:
    """The module that replaces the layer; its bias keeps the dtype of the layer's weight."""
    packed, dtype = PackedWeight.of(weight), layer.weight.dtype
    bias = None if bias is None else bias.to(dtype)
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(packed, bias, input_quantizer, dtype, ConvGeometry(layer))
    return QuantizedLinear(packed, bias, input_quantizer, dtype)
