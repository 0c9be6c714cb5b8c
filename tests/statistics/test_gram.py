"""Grams: the products they stand for, merging, and the output error that follows from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import ShapeError
from dither.statistics.gram import TILE, Gram


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_ones(x: Tensor, ones: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=x.dtype)], dim=1) if ones else rows


@pytest.mark.parametrize("ones", [True, False])
def test_the_three_products_are_plain_sums_over_rows(ones: bool) -> None:
    x, seen = drawn(3, 5, 4), drawn(3, 5, 4, seed=1)
    gram = Gram.of(seen, x, ones)
    A, Q = with_ones(x, ones), with_ones(seen, ones)
    assert gram.rows == 15
    torch.testing.assert_close(gram.quantized, Q.T @ Q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.cross, Q.T @ A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.original, A.T @ A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [TILE - 1, TILE, 2 * TILE + 3])
def test_a_gram_of_many_columns_is_put_together_of_tiles(columns: int) -> None:
    x = drawn(7, columns).float()
    gram = Gram.of(x, dtype=torch.float32).quantized
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, (x.T @ x).double(), rtol=1e-6, atol=1e-6)


def test_where_inputs_do_not_differ_the_three_are_one_tensor_also_after_a_merge() -> None:
    gram = Gram.of(drawn(5, 4)).merge(Gram.of(drawn(2, 4)))
    assert gram.cross is gram.quantized and gram.original is gram.quantized


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(2, 20), columns=st.integers(1, 5), cut=st.integers(1, 19), ones=st.booleans(),
    same=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_merging_two_uneven_parts_equals_one_pass(
    rows: int, columns: int, cut: int, ones: bool, same: bool, seed: int
) -> None:
    x, seen, cut = drawn(rows, columns, seed=seed), drawn(rows, columns, seed=seed + 1), min(cut, rows - 1)
    parts = [Gram.of(seen[part], None if same else x[part], ones) for part in (slice(cut), slice(cut, None))]
    merged, once = parts[0].merge(parts[1]), Gram.of(seen, None if same else x, ones)
    assert merged.rows == once.rows == rows
    for name in ("quantized", "cross", "original"):
        torch.testing.assert_close(getattr(merged, name), getattr(once, name), rtol=1e-12, atol=1e-12)


def test_a_merge_of_parts_with_and_without_difference_keeps_both() -> None:
    x, seen = drawn(6, 3), drawn(6, 3, seed=1)
    merged = Gram.of(x[:2]).merge(Gram.of(seen[2:], x[2:]))
    mixed = torch.cat([x[:2], seen[2:]])
    torch.testing.assert_close(merged.cross, mixed.T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.original, x.T @ x, rtol=1e-12, atol=1e-12)


def test_grams_of_other_layers_do_not_merge() -> None:
    with pytest.raises(ShapeError, match="merging Grams of 3 and 4 columns"):
        Gram.of(drawn(2, 3)).merge(Gram.of(drawn(2, 3), ones=True))


@pytest.mark.parametrize("ones", [True, False])
def test_the_output_error_is_that_of_the_outputs_themselves(ones: bool) -> None:
    x = drawn(50, 6)
    seen = x + 0.1 * drawn(50, 6, seed=1)
    weight = drawn(4, 7 if ones else 6, seed=2)
    rounded = weight + 0.05 * drawn(*weight.shape, seed=3)
    true, found = with_ones(x, ones) @ weight.T, with_ones(seen, ones) @ rounded.T
    expected = float((found - true).square().sum() / true.square().sum())
    assert Gram.of(seen, x, ones).output_error(weight, rounded) == pytest.approx(expected, rel=1e-9)
    assert Gram.of(x, None, ones).output_error(weight, weight) == pytest.approx(0, abs=1e-12)


def test_the_output_error_of_a_layer_without_output_is_zero() -> None:
    assert Gram.of(torch.zeros(3, 2)).output_error(torch.ones(1, 2), torch.ones(1, 2)) == 0


def test_half_inputs_are_summed_in_float64() -> None:
    x = torch.full((5000, 1), 0.1, dtype=torch.bfloat16)
    gram = Gram.of(x)
    assert gram.quantized.dtype == torch.float64
    assert float(gram.quantized) == pytest.approx(5000 * float(x[0, 0]) ** 2, rel=1e-12)
