"""Sparse entries: dense and back, and their bytes counted by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.errors import ShapeError, SpecError
from dither.formats.sparse import Sparse


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 9), i=st.integers(1, 11), share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 10**6))
def test_dense_and_back_keeps_the_chosen_entries_alone(o: int, i: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(o, i, generator=generator)
    mask = torch.rand(o, i, generator=generator) < share
    sparse = Sparse.of(dense, mask)
    expected = torch.where(mask, dense.half().float(), 0.0)
    assert torch.equal(sparse.dense(), expected)
    assert sparse.count == int(mask.sum())
    for row in range(o):
        mine = slice(int(sparse.row_offsets[row]), int(sparse.row_offsets[row + 1]))
        assert sparse.columns[mine].tolist() == mask[row].nonzero()[:, 0].tolist()
    unpacked = Sparse.unpack(sparse.pack(), (o, i))
    assert torch.equal(unpacked.dense(), expected) and unpacked.nbytes == sparse.nbytes
    sparse.check()


def test_an_outlier_takes_32_bits_and_a_row_32_more_for_its_offset() -> None:
    mask = torch.zeros(8, 1000, dtype=torch.bool)
    mask[:, :10] = True
    sparse = Sparse.of(torch.ones(8, 1000), mask)
    assert sparse.nbytes == 80 * (2 + 2) + 9 * 4
    assert sparse.nbytes == sum(part.nbytes for part in sparse.pack().values())


@pytest.mark.parametrize(("columns", "dtype"), [(65_536, torch.int16), (65_537, torch.int32)])
def test_columns_take_16_bits_as_long_as_these_can_number_them(columns: int, dtype: torch.dtype) -> None:
    dense, mask = torch.arange(float(columns))[None] / columns, torch.zeros(1, columns, dtype=torch.bool)
    mask[0, [0, 32_768, columns - 1]] = True
    sparse = Sparse.of(dense, mask)
    assert sparse.pack()["outlier_columns"].dtype == dtype
    assert Sparse.unpack(sparse.pack(), (1, columns)).columns.tolist() == [0, 32_768, columns - 1]


def test_a_value_beyond_float16_is_refused() -> None:
    with pytest.raises(SpecError, match=r"an outlier of 1e.05 does not fit into float16"):
        Sparse.of(torch.tensor([[1.0, 1e5]]), torch.tensor([[True, True]]))


def test_rows_and_columns_that_do_not_describe_the_matrix_are_refused() -> None:
    sparse = Sparse.of(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="do not add up to 6 entries"):
        Sparse(sparse.values, sparse.columns, sparse.row_offsets - 1, (2, 3)).check()
    with pytest.raises(ShapeError, match="a sparse column lies outside"):
        Sparse(sparse.values, sparse.columns, sparse.row_offsets, (2, 2)).check()
