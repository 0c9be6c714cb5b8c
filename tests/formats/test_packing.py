"""Packing: golden bytes computed with plain integers, round trips of every width, errors on what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.errors import ShapeError
from dither.formats.packing import pack, packed_width, unpack


def stream(row: list[int], bits: int) -> list[int]:
    """The bytes of a row by one long integer: value k stands at bit k * bits."""
    number = sum(code << (k * bits) for k, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * bits // 8), "little"))


@settings(deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), count=st.integers(1, 67), seed=st.integers(0, 2**16))
def test_codes_come_back_and_their_bytes_are_the_long_integer_of_the_row(
    bits: int, rows: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(count, bits))
    assert packed.tolist() == [stream(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 1, [0b00001101, 0b1]),
        ([1, 2, 3, 0, 3], 2, [0b00111001, 0b11]),
        ([1, 2, 3], 3, [0b11010001, 0b0]),
        ([0xA, 0xB, 0xC], 4, [0xBA, 0x0C]),
        ([31, 0, 31], 5, [0b00011111, 0b01111100]),
        ([255, 0, 7], 8, [255, 0, 7]),
    ],
)
def test_the_least_significant_bit_comes_first(codes: list[int], bits: int, expected: list[int]) -> None:
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [expected]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_codes_of_every_width_survive(bits: int) -> None:
    codes = torch.full((2, 13), 2**bits - 1, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert int(packed[0].sum()) == sum(stream([2**bits - 1] * 13, bits))
    assert torch.equal(unpack(packed, bits, 13), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_an_error(bits: int) -> None:
    codes = torch.zeros(1, 5, dtype=torch.uint8)
    codes[0, 3] = 2**bits
    with pytest.raises(ShapeError, match=f"below {2**bits}, got {2**bits}"):
        pack(codes, bits)


def test_a_row_of_the_wrong_length_or_a_width_beyond_a_byte_is_an_error() -> None:
    with pytest.raises(ShapeError, match="expected 2 bytes, got 3"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), bits=3, count=5)
    for bits in (0, 9):
        with pytest.raises(ShapeError, match="1 to 8 bits"):
            pack(torch.zeros(1, 3, dtype=torch.uint8), bits)
        with pytest.raises(ShapeError, match="1 to 8 bits"):
            unpack(torch.zeros(1, 3, dtype=torch.uint8), bits, 3)


def test_packing_leaves_its_input_alone_and_returns_its_own_memory() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = pack(codes, 8)
    packed.zero_()
    assert codes.tolist() == torch.arange(16).reshape(2, 8).tolist()
    assert pack(codes[:, ::2], 4).tolist() == [stream([0, 2, 4, 6], 4), stream([8, 10, 12, 14], 4)]
