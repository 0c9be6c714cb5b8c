"""Layers as matrices: which modules count, finite weights, rows of inputs that reproduce the layer."""

import pytest
import torch
from torch import Tensor, nn

from dither.errors import NonFiniteError
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.models.layers import has_gram, input_rows, is_layer, quantized, rows_alike, set_weight_matrix, weight_matrix


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Linear):
    """Computes with another weight than the one it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Renamed(nn.Linear):
    """Nothing but another name."""


def test_a_subclass_counts_unless_it_computes_in_its_own_way() -> None:
    assert is_layer(nn.Linear(2, 2))
    assert is_layer(nn.Conv2d(2, 2, 1))
    assert is_layer(Renamed(2, 2))
    assert not is_layer(Scaled(2, 2))
    assert not is_layer(nn.Conv1d(2, 2, 1))
    assert not is_layer(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.fc\.weight holds NaN or Inf"):
        weight_matrix(layer, "blocks.3.fc")


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), bias=False),
    nn.Conv2d(4, 6, 3, dilation=2, padding="same", padding_mode="reflect"),
    nn.Conv2d(4, 6, 2, padding="same"),
    nn.Conv2d(4, 6, 2, stride=2, padding="valid"),
]


@pytest.mark.parametrize("layer", [nn.Linear(7, 3), *CONVOLUTIONS], ids=str)
def test_rows_times_the_matrix_are_what_the_layer_puts_out(layer: nn.Linear | nn.Conv2d) -> None:
    x = drawn(2, 5, 7) if isinstance(layer, nn.Linear) else drawn(2, 4, 7, 8)
    with torch.no_grad():
        out = input_rows(layer, x) @ weight_matrix(layer, "layer").T
        out = out if layer.bias is None else out + layer.bias
        expected = layer(x)
    expected = expected if isinstance(layer, nn.Linear) else expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(7, 3), *CONVOLUTIONS, nn.Conv2d(4, 8, 3, groups=2)], ids=str)
def test_the_quantized_layer_stands_in_for_the_layer(layer: nn.Linear | nn.Conv2d) -> None:
    spec = QuantSpec.parse("int8:asym").model_copy(update={"scale_dtype": "float32"})
    weight = weight_matrix(layer, "layer")
    replacement = quantized(layer, quantize(weight, fit_grid(weight, spec)), layer.bias, None)
    x = drawn(2, 5, 7) if isinstance(layer, nn.Linear) else drawn(2, 4, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(replacement(x), layer(x), rtol=0.02, atol=0.02)
    facts = ["in_features", "out_features"]
    if isinstance(layer, nn.Conv2d):
        facts = [
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
            "in_channels",
            "out_channels",
        ]
    assert {key: getattr(replacement, key) for key in facts} == {key: getattr(layer, key) for key in facts}


def test_a_grouped_convolution_has_no_gram() -> None:
    assert has_gram(nn.Linear(2, 2))
    assert has_gram(nn.Conv2d(4, 4, 3))
    assert not has_gram(nn.Conv2d(4, 4, 3, groups=4))


def test_kernels_cut_the_same_patches_only_if_all_of_their_geometry_agrees() -> None:
    plain = nn.Conv2d(4, 4, 3)
    assert rows_alike(plain, nn.Conv2d(4, 9, 3, bias=False))
    for other in ({"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}):
        assert not rows_alike(plain, nn.Conv2d(4, 4, 3, **other))
    assert not rows_alike(plain, nn.Linear(4, 4))
    assert rows_alike(nn.Linear(4, 4), nn.Linear(4, 2))


def test_a_matrix_is_written_into_the_layer_and_a_bias_created() -> None:
    layer = nn.Conv2d(2, 3, 2, bias=False).half()
    matrix, bias = drawn(3, 8), drawn(3)
    set_weight_matrix(layer, matrix, bias)
    assert torch.equal(layer.weight, matrix.reshape(3, 2, 2, 2).half())
    assert layer.bias is not None
    assert torch.equal(layer.bias, bias.half())
