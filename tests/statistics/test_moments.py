"""Moments of channels."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.statistics.moments import Moments


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 20), columns=st.integers(1, 5), cut=st.integers(1, 19), seed=st.integers(0, 10**6))
def test_merging_two_uneven_parts_equals_one_pass(rows: int, columns: int, cut: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    cut = min(cut, rows - 1)
    merged, once = Moments.of(x[:cut]).merge(Moments.of(x[cut:])), Moments.of(x)
    assert merged.rows == once.rows == rows
    torch.testing.assert_close(merged.total, once.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.square, once.square, rtol=1e-12, atol=1e-12)


def test_moments_are_those_of_torch_over_all_but_the_last_axis() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    moments, flat = Moments.of(x), x.reshape(-1, 3)
    torch.testing.assert_close(moments.mean, flat.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.mean_square, (flat**2).mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, flat.var(dim=0, correction=0), rtol=1e-9, atol=0)


def test_a_variance_is_never_negative() -> None:
    assert float(Moments.of(torch.full((7, 1), 1 / 3)).variance) >= 0
