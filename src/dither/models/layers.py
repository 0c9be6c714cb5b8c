"""The layers that dither quantizes, each seen as a matrix [o, i] that multiplies rows of inputs."""

from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.errors import NonFiniteError
from dither.formats.qtensor import QTensor
from dither.nn.activation import ActivationQuantizer
from dither.nn.linear import ConvGeometry, PackedWeight, QuantizedConv2d, QuantizedLinear

_PATCHES = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)


def is_layer(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether dither can store this module's weight as codes: a layer that computes as its base class does."""
    return isinstance(module, nn.Linear | nn.Conv2d) and type(module).forward in _FORWARDS


def weight_matrix(layer: nn.Linear | nn.Conv2d, name: str) -> Float[Tensor, "o i"]:
    """The weight as a float32 matrix; a kernel's patch is one row.

    Raises:
        NonFiniteError: NaN or Inf in the weight.
    """
    weight = layer.weight.detach().flatten(1).float()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{name}.weight holds NaN or Inf; repair or re-download the model")
    return weight


def set_weight_matrix(layer: nn.Linear | nn.Conv2d, weight: Float[Tensor, "o i"], bias: Tensor | None) -> None:
    """Replace weight and bias of a full-precision layer in place; a bias is created where there was none."""
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)


def has_gram(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether all outputs read the same inputs; a grouped convolution's do not."""
    return isinstance(layer, nn.Linear) or layer.groups == 1


def input_rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Float[Tensor, "*b i"]:
    """The inputs as rows that the weight matrix multiplies: as they are, or patches of a picture."""
    return x if isinstance(layer, nn.Linear) else ConvGeometry(layer).rows(x)


def rows_alike(one: nn.Linear | nn.Conv2d, two: nn.Linear | nn.Conv2d) -> bool:
    """Whether two layers that are given the same tensor multiply the same rows; kernels may cut other patches."""
    if isinstance(one, nn.Conv2d) and isinstance(two, nn.Conv2d):
        return all(getattr(one, key) == getattr(two, key) for key in _PATCHES)
    return isinstance(one, nn.Linear) and isinstance(two, nn.Linear)


def quantized(
    layer: nn.Linear | nn.Conv2d, weight: QTensor, bias: Tensor | None, input_quantizer: ActivationQuantizer | None
) -> QuantizedLinear | QuantizedConv2d:
    """The module that replaces the layer; its bias keeps the dtype of the layer's weight."""
    packed, dtype = PackedWeight.of(weight), layer.weight.dtype
    bias = None if bias is None else bias.to(dtype)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(packed, bias, input_quantizer, dtype)
    return QuantizedConv2d(packed, bias, input_quantizer, dtype, ConvGeometry(layer))
