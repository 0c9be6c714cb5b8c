"""Mixed formats: columns of different widths are packed to their real bits, counted, and read back exactly."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dither.decode import decode
from dither.errors import ShapeError, SpecError
from dither.formats.fit import fit_grid
from dither.formats.mixed import SPANS, MixedGrid, count_widths, fit_mixed, pack_columns, unpack_columns, widths_of
from dither.formats.packing import packed_width
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import QuantSpec
from dither.models.structure import describe_weight, read_layout

FORMATS = [
    "mix3", "mix3:tensor", "mix3:asym:realzero", "mix2:g4", "mix4:g4:asym:realzero:tight", "mix3:mse",
    "mix3:g4:asym:realzero:mse", "mix3:g4:asym:tight:realzero:s4.3",
]  # fmt: skip
TOPS = {
    "whole bits": [0, 1, 3, 7, 15, 31, 63, 127, 255, 7, 7, 1],
    "levels": [0, 1, 2, 4, 9, 30, 100, 200, 254, 6, 5, 2],
    "one width": [7] * 12,
    "nothing": [0] * 12,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tops(name: str) -> Tensor:
    return torch.tensor(TOPS[name], dtype=torch.uint8)


@pytest.mark.parametrize("name", TOPS)
@pytest.mark.parametrize("text", FORMATS)
def test_what_is_packed_decodes_to_the_same_values_by_both_readers(text: str, name: str) -> None:
    weight = drawn(9, 12)
    tensor = quantize(weight, fit_mixed(weight, QuantSpec.parse(text), tops(name)))
    parts, entry = tensor.pack(), describe_weight(tensor.layout)
    assert read_layout(entry) == tensor.layout
    assert {key: (tuple(part.shape), part.dtype) for key, part in parts.items()} == tensor.layout.tensors()
    assert tensor.nbytes == sum(part.nbytes for part in parts.values())
    again = QTensor.unpack(parts, tensor.layout)
    assert torch.equal(again.codes, tensor.codes)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert torch.equal(torch.from_numpy(decode(parts, entry)), tensor.dequantize())
    assert torch.equal(quantize(tensor.dequantize(), tensor.grid).dequantize(), tensor.dequantize())


def test_bytes_are_those_counted_by_hand() -> None:
    """16 columns of 2 bits, 8 of 3, 3 of 0 and one of 8; a scale of 16 bits a row and a byte a column."""
    top = torch.tensor([3] * 16 + [0, 0, 0] + [7] * 8 + [255], dtype=torch.uint8)
    weight = drawn(10, 28)
    tensor = quantize(weight, fit_mixed(weight, QuantSpec.parse("mix2"), top))
    assert tensor.nbytes == 10 * (4 + 3 + 1) + 10 * 2 + 28
    assert tensor.layout.widths == (3, 0, 16, 8, 0, 0, 0, 0, 1)


def test_widths_are_the_bits_of_the_highest_code() -> None:
    assert [int(x) for x in widths_of(torch.arange(256, dtype=torch.uint8))] == [x.bit_length() for x in range(256)]


@pytest.mark.parametrize("text", ["mix4:mse", "mix3:g4:asym:tight:realzero", "mix2:asym:realzero"])
def test_columns_of_one_width_are_the_uniform_format(text: str) -> None:
    weight, spec = drawn(9, 12), QuantSpec.parse(text)
    top = torch.full((12,), spec.levels - 1, dtype=torch.uint8)
    plain = QuantSpec(**{**spec.fields(), "kind": "int", "search": "minmax"})
    mixed = fit_mixed(weight, spec.model_copy(update={"search": "minmax"}), top)
    torch.testing.assert_close(mixed.round(weight), fit_grid(weight, plain).round(weight), rtol=1e-6, atol=1e-6)


def test_wider_columns_err_less_and_columns_of_no_bits_are_zero() -> None:
    weight, top = drawn(64, 9), torch.tensor([2**bits - 1 for bits in range(9)], dtype=torch.uint8)
    stored = quantize(weight, fit_mixed(weight, QuantSpec.parse("mix3:asym:realzero"), top)).dequantize()
    errors = (stored - weight).square().sum(dim=0)
    assert bool((stored[:, 0] == 0).all())
    assert bool((errors[2:].diff() < 0).all())
    steps = (weight.amax(dim=1) - weight.amin(dim=1)) / 255 * SPANS[8] / SPANS[3]
    assert bool(((stored[:, 8] - weight[:, 8]).abs() <= 0.51 * steps).all())
    shares = errors[1:8] / weight[:, 1:8].square().sum(dim=0)
    assert bool((shares[1:] < shares[:-1] * 0.7).all()), "every bit lowers a normal column's error"


def test_a_column_of_no_bits_does_not_stretch_the_range() -> None:
    weight = drawn(8, 6)
    loud = torch.cat([weight, torch.full((8, 1), 100.0)], dim=1)
    top = torch.tensor([7] * 6 + [0], dtype=torch.uint8)
    alone = fit_mixed(weight, QuantSpec.parse("mix3"), top[:6])
    torch.testing.assert_close(fit_mixed(loud, QuantSpec.parse("mix3"), top).base.scale, alone.base.scale)


def test_searched_ranges_err_less_than_the_extremes_and_heed_importance() -> None:
    weight, top = drawn(32, 48), torch.full((48,), 3, dtype=torch.uint8)
    importance = torch.logspace(0, -4, 48)

    def error(grid: MixedGrid) -> float:
        return float(((grid.round(weight) - weight).square() * importance).sum())

    plain, searched, weighed = (
        fit_mixed(weight, QuantSpec.parse(text), top, given)
        for text, given in (("mix2", None), ("mix2:mse", None), ("mix2:mse", importance))
    )
    assert error(weighed) < error(searched) < error(plain)


def test_damaged_parts_are_refused() -> None:
    weight = drawn(4, 12)
    tensor = quantize(weight, fit_mixed(weight, QuantSpec.parse("mix3"), tops("whole bits")))
    parts = tensor.pack()
    with pytest.raises(ShapeError, match="columns of 0 to 8 bits: expected"):
        QTensor.unpack({**parts, "column_top": parts["column_top"] // 2}, tensor.layout)
    with pytest.raises(ShapeError, match="beyond the highest"):
        replace(tensor, codes=tensor.codes + 1).pack()


@pytest.mark.parametrize("bits", range(9))
def test_codes_of_every_width_come_back(bits: int) -> None:
    top = torch.full((11,), 2**bits - 1, dtype=torch.uint8)
    codes = torch.randint(0, 2**bits, (5, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_columns(codes, top)
    assert packed.shape == (5, packed_width(11, bits))
    assert torch.equal(unpack_columns(packed, top, count_widths(top)), codes)


@pytest.mark.parametrize("text", ["mix3:asym", "mix3:unsigned", "mix3:narrow", "mix3:dual", "mix3:g4:ic", "mix3:pow2",
                                  "mix3:token", "mix3:percentile", "mix3:dynamic"])  # fmt: skip
def test_what_columns_of_different_widths_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="mix3"):
        QuantSpec.parse(text)


def test_texts_read_back_and_take_no_range_from_a_base_of_another_kind() -> None:
    for text in FORMATS:
        assert QuantSpec.parse(str(QuantSpec.parse(text))) == QuantSpec.parse(text)
    base = QuantSpec.parse("int4:g32:asym:percentile")
    assert str(QuantSpec.parse("mix3", base)) == "mix3:g32"
    mixed = QuantSpec.parse("mix4:channel:asym:realzero:mse")
    assert str(QuantSpec.parse("mix3:g8", mixed)) == "mix3:g8:asym:realzero:mse"


def test_only_a_method_that_allocates_can_fit_it() -> None:
    with pytest.raises(SpecError, match="weights need a uniform format"):
        fit_grid(drawn(4, 12), QuantSpec.parse("mix3"))
    with pytest.raises(SpecError, match="need a mixed format, such as mix3"):
        fit_mixed(drawn(4, 12), QuantSpec.parse("int3"), tops("one width"))


def test_both_readers_know_the_same_steps_for_every_highest_code() -> None:
    weight, top = drawn(3, 256), torch.arange(256, dtype=torch.uint8)
    for bits, shift in product(range(1, 9), ("", ":asym:realzero")):
        tensor = quantize(weight, fit_mixed(weight, QuantSpec.parse(f"mix{bits}{shift}"), top))
        assert torch.equal(torch.from_numpy(decode(tensor.pack(), describe_weight(tensor.layout))), tensor.dequantize())


def test_a_column_of_few_codes_spans_less_of_its_cell_about_the_same_middle() -> None:
    weight = drawn(16, 3) + 1
    grid = fit_mixed(weight, QuantSpec.parse("mix3:asym:tight:realzero"), torch.tensor([7, 3, 1], dtype=torch.uint8))
    low, high = grid.decode(torch.zeros(16, 3)), grid.decode(grid.top.expand(16, 3).float())
    middle, span = (low + high) / 2, high - low
    torch.testing.assert_close(middle, middle[:, :1].expand(16, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(span / span[:, :1], torch.tensor(SPANS)[[3, 2, 1]].expand(16, 3) / SPANS[3])
