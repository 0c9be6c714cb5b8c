"""Quantized layers compute what the dense layer does with the dequantized weight, bit for bit."""

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dither.errors import SpecError
from dither.formats.activation import fit_activation
from dither.formats.fit import fit_grid
from dither.formats.low_rank import LowRank
from dither.formats.qtensor import QTensor, quantize
from dither.formats.sparse import Sparse
from dither.formats.spec import QuantSpec
from dither.models.layers import is_layer, rows_alike
from dither.nn.activation import ActivationQuantizer
from dither.nn.linear import ConvGeometry, PackedWeight, QuantizedConv2d, QuantizedLinear, cache_weights

TEXTS = ["int4", "int3:asym", "int8:g1:asym", "int5:dual:asym", "int4:asym:tight:realzero", "int2:g1:ic", "int1"]
TEXTS += ["nf4", "fp4:g1:s4.2", "mxint3", "int4:g1:asym:tight:realzero:s3.4"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: Tensor, text: str = "int4:asym", scale_dtype: str = "float16") -> QTensor:
    spec = QuantSpec.parse(text).model_copy(update={"scale_dtype": scale_dtype})
    matrix = weight.detach().flatten(1)
    return quantize(matrix, fit_grid(matrix, spec))


def quantizer_of(x: Tensor, text: str = "int4:tensor:asym") -> ActivationQuantizer:
    spec = QuantSpec.parse(text)
    return ActivationQuantizer(spec).set(fit_activation(x.reshape(-1, x.shape[-1]), spec))


def linear(i: int, o: int, bias: bool, text: str = "int4:asym", **options: Any) -> tuple[QuantizedLinear, QTensor]:
    weight = stored(drawn(o, i), text, **options)
    return QuantizedLinear(PackedWeight.of(weight), drawn(o, seed=1) if bias else None, None, torch.float32), weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("i", "o"), [(16, 24), (7, 3), (1, 1), (13, 1), (1, 5)])
def test_a_linear_layer_is_the_dense_one_with_the_dequantized_weight(text: str, i: int, o: int, bias: bool) -> None:
    layer, weight = linear(i, o, bias, text)
    for x in (drawn(5, i, seed=2), drawn(2, 3, i, seed=2), drawn(i, seed=2)):
        assert torch.equal(layer(x), functional.linear(x, weight.dequantize(), layer.bias))
    layer.input_quantizer = quantizer_of(drawn(20, i))
    x = drawn(2, 3, i, seed=2)
    assert torch.equal(layer(x), functional.linear(layer.input_quantizer(x), weight.dequantize(), layer.bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_linear_layer_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer, weight = linear(8, 5, bias=True)
    x = drawn(3, 8, seed=2).to(dtype)
    assert layer.bias is not None
    assert torch.equal(layer(x), functional.linear(x, weight.dequantize().to(dtype), layer.bias.to(dtype)))


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 4, "stride": 4},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (2, 3)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 2, "padding": "valid"},
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    {"kernel_size": (2, 4), "padding": "same", "padding_mode": "replicate"},
]


def convolution(options: dict[str, Any], bias: bool) -> nn.Conv2d:
    conv = nn.Conv2d(4, 8, bias=bias, **options).requires_grad_(False)
    conv.weight.copy_(drawn(*conv.weight.shape))
    if conv.bias is not None:
        conv.bias.copy_(drawn(8, seed=1))
    return conv


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_is_the_dense_one_with_the_dequantized_kernel(options: dict[str, Any], bias: bool) -> None:
    conv, x = convolution(options, bias), drawn(2, 4, 11, 9, seed=2)
    weight, quantizer = stored(conv.weight), quantizer_of(x)
    plain, geometry = PackedWeight.of(weight), ConvGeometry(conv)
    conv.weight.copy_(weight.dequantize().reshape(conv.weight.shape))
    found = QuantizedConv2d(plain, conv.bias, None, torch.float32, geometry)(x)
    assert torch.equal(found, conv(x))
    found = QuantizedConv2d(PackedWeight.of(weight), conv.bias, quantizer, torch.float32, geometry)(x)
    assert torch.equal(found, conv(quantizer(x)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", [one for one in CONVOLUTIONS if "groups" not in one], ids=str)
def test_patches_times_kernel_rows_are_the_convolution(options: dict[str, Any]) -> None:
    conv, x = convolution(options, bias=True).double(), drawn(2, 4, 11, 9, seed=2).double()
    assert conv.bias is not None
    found = ConvGeometry(conv).rows(x) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(found.transpose(1, 2), conv(x).flatten(2), rtol=1e-10, atol=1e-10)


class Same(nn.Conv2d):
    """Pads as TensorFlow's SAME does: ceil(size / stride) outputs, the odd zero behind."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[2:]
        padded = input
        for outputs, position, size in ((-(-width // 2), 0, width), (-(-height // 2), 2, height)):
            zeros = max((outputs - 1) * 2 + 3 - size, 0)
            edges = [0, 0, 0, 0]
            edges[position], edges[position + 1] = zeros // 2, zeros - zeros // 2
            padded = functional.pad(padded, edges)
        return functional.conv2d(padded, self.weight, self.bias, 2, groups=self.groups)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 11), (7, 5)])
def test_timms_convolution_pads_by_the_size_of_each_picture(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], groups: int
) -> None:
    conv = Same(4, 8, 3, stride=2, groups=groups).requires_grad_(False)
    assert not is_layer(conv)
    monkeypatch.setitem(sys.modules, "timm.layers.conv2d_same", SimpleNamespace(Conv2dSame=Same))
    assert is_layer(conv)
    x, weight = drawn(2, 4, *size, seed=2), stored(conv.weight)
    conv.weight.copy_(weight.dequantize().reshape(conv.weight.shape))
    geometry = ConvGeometry(conv)
    found = QuantizedConv2d(PackedWeight.of(weight), conv.bias, None, torch.float32, geometry)(x)
    assert torch.equal(found, conv(x))
    if groups == 1:
        assert conv.bias is not None
        rows = geometry.rows(x) @ conv.weight.flatten(1).T + conv.bias
        torch.testing.assert_close(rows.transpose(1, 2), conv(x).flatten(2), rtol=1e-5, atol=1e-5)
    assert not rows_alike(conv, nn.Conv2d(4, 8, 3, stride=2, groups=groups))


@pytest.mark.parametrize("text", ["int8:token", "int4:channel:asym"])
def test_a_convolution_refuses_input_scales_along_the_width_of_the_picture(text: str) -> None:
    conv = convolution({"kernel_size": 3}, bias=False)
    quantizer = ActivationQuantizer(QuantSpec.parse(text), channels=9)
    with pytest.raises(SpecError, match="the input of a convolution has one scale a tensor"):
        QuantizedConv2d(PackedWeight.of(stored(conv.weight)), None, quantizer, torch.float32, ConvGeometry(conv))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_outliers_and_a_correction_act_as_products_of_their_own(dtype: Any) -> None:
    weight, base = drawn(40, 64), stored(drawn(40, 64), "int4:g16:asym")
    rest = weight - base.dequantize()
    sparse = Sparse.of(rest, rest.abs() > 0.1)
    u, s, v = torch.linalg.svd(rest - sparse.dense(), full_matrices=False)
    low_rank = LowRank.of(v[:6], u[:, :6] * s[:6], dtype)
    layer = QuantizedLinear(PackedWeight.of(replace(base, sparse=sparse, low_rank=low_rank)), None, None, torch.float32)
    x = drawn(5, 64, seed=2)
    expected = x @ base.dequantize().T + x @ sparse.dense().T + (x @ low_rank.a.T) @ low_rank.b.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    empty = QuantizedLinear(PackedWeight(layer.packed.layout), None, None, torch.float32)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x)) and torch.equal(layer(input=x), layer(x))
    assert sum(p.nbytes for p in layer.packed.state_dict().values()) == base.nbytes + sparse.nbytes + low_rank.nbytes


def test_cached_weights_give_the_same_result_and_can_be_dropped() -> None:
    layer, _ = linear(9, 5, bias=True)
    x, model = drawn(3, 9, seed=2), nn.Sequential(layer)
    plain = model(x)
    assert layer.packed._dense is None
    assert cache_weights(model) is model
    assert torch.equal(model(x), plain) and torch.equal(model(x), plain)
    assert layer.packed(torch.float32) is layer.packed(torch.float32)
    assert layer.packed(torch.float64).dtype == torch.float64
    assert layer(x.half()).dtype == torch.float16
    cache_weights(model, cached=False)
    assert layer.packed._dense is None and torch.equal(model(x), plain)


def test_a_cached_weight_does_not_outlive_a_loaded_state_or_a_move() -> None:
    layer, _ = linear(9, 5, bias=False)
    other = QuantizedLinear(PackedWeight.of(stored(drawn(5, 9, seed=7))), None, None, torch.float32)
    x = drawn(3, 9, seed=2)
    cache_weights(layer)(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.to(torch.float64)
    assert layer.packed._dense is None


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_a_change_of_the_networks_dtype_leaves_stored_scales_as_they_are(scale_dtype: str) -> None:
    layer, weight = linear(9, 5, bias=True, text="int4:asym:tight:realzero", scale_dtype=scale_dtype)
    before = copy.deepcopy(layer.packed.state_dict())
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        after = layer.packed.state_dict()
        assert {name: part.dtype for name, part in after.items()} == {name: p.dtype for name, p in before.items()}
        assert all(torch.equal(part, before[name]) for name, part in after.items())
        assert layer.bias is not None and layer.bias.dtype == dtype
        assert layer.weight.dtype == dtype  # networks ask for it to cast what they feed
    assert torch.equal(layer.packed(torch.float32), weight.dequantize())


@pytest.mark.parametrize("text", TEXTS)
def test_an_empty_layer_takes_the_state_of_a_quantized_one(text: str) -> None:
    layer, weight = linear(13, 7, bias=True, text=text)
    empty = QuantizedLinear(PackedWeight(weight.layout), torch.zeros(7), None, torch.float32)
    empty.load_state_dict(layer.state_dict())
    x = drawn(3, 13, seed=2)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(empty.packed.qtensor().codes, weight.codes)
    assert sum(p.nbytes for p in layer.packed.state_dict().values()) == weight.nbytes


def test_a_quantized_layer_shows_its_weight_and_trains_nothing() -> None:
    layer, weight = linear(9, 5, bias=True)
    assert torch.equal(layer.weight, weight.dequantize())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert "int4:channel:asym, shape=(5, 9)" in repr(layer)


def test_a_deep_copy_is_independent() -> None:
    layer, _ = linear(9, 5, bias=True)
    x = drawn(3, 9, seed=2)
    other, plain = copy.deepcopy(layer), layer(x)
    other.packed.get_buffer("codes").zero_()
    assert torch.equal(layer(x), plain) and not torch.equal(other(x), plain)
