"""Extremes of channels."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.statistics.extremes import MinMax


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 20), columns=st.integers(1, 5), cut=st.integers(1, 19), seed=st.integers(0, 10**6))
def test_merging_two_uneven_parts_equals_one_pass(rows: int, columns: int, cut: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    cut = min(cut, rows - 1)
    merged, once = MinMax.of(x[:cut]).merge(MinMax.of(x[cut:])), MinMax.of(x)
    assert torch.equal(merged.low, once.low) and torch.equal(merged.high, once.high)
    assert once.low.tolist() == x.min(dim=0).values.tolist()
    assert once.high.tolist() == x.max(dim=0).values.tolist()
