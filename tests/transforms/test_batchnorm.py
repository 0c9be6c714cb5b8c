"""A normalization folded into the layer before it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dither.transforms.batchnorm import ChannelNorm, fold_norm


@settings(max_examples=20, deadline=None)
@given(o=st.integers(1, 6), i=st.integers(1, 5), bias=st.booleans(), seed=st.integers(0, 99))
def test_the_folded_layer_puts_out_what_the_normalization_did(o: int, i: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(o, i, generator=generator).double(), torch.randn(7, i, generator=generator).double()
    offset = torch.randn(o, generator=generator).double() if bias else None
    norm = nn.BatchNorm1d(o, eps=0.01).double().eval()
    with torch.no_grad():
        for part in (norm.weight, norm.bias, norm.running_mean):
            part.copy_(torch.randn(o, generator=generator))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.rand(o, generator=generator))  # type: ignore[union-attr]
    layer = ChannelNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, 0.01)  # type: ignore[arg-type]
    rows, shift = fold_norm(weight, offset, layer)
    expected = norm(nn.functional.linear(x, weight, offset))
    torch.testing.assert_close(nn.functional.linear(x, rows, shift), expected, rtol=1e-10, atol=1e-10)
