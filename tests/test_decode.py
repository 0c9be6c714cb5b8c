"""The independent reader: what it makes of stored bits is what the writer meant, for every kind of storage."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dither.decode import decode
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid, column_index, grid_shape
from dither.formats.low_rank import LowRank
from dither.formats.qtensor import QTensor, quantize
from dither.formats.sparse import Sparse
from dither.formats.spec import QuantSpec
from dither.models.structure import describe_weight, read_layout

FORMATS = [
    "int1", "int2:asym", "int3", "int4:asym", "int5:g4:asym", "int8:tensor:sym", "int4:unsigned", "int7:g3:ic",
    "int4:asym:tight", "int4:asym:realzero", "int4:asym:clampzero", "int3:asym:dual", "int4:pow2", "int6:sym:narrow",
    "nf4", "fp4:tensor", "nf4:g4", "nf4:g3:ic", "nf4:g4:s8.4", "mxint4:g4", "mxint2:g6", "mxint8",
    "int3:g4:asym:tight:realzero:s3.4", "int4:g4:asym:s5.2", "int4:g6:s2.16", "int3:g3:ic:asym:realzero:s4.2",
    "int3:asym:realzero:dual:s4.3",
    "nuq1", "nuq3", "nuq2:tensor", "nuq4:g4", "nuq3:dual", "nuq2:g4:dual", "nuq3:g3:ic",
]  # fmt: skip
SHAPE = (9, 12)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(text: str) -> QTensor:
    spec, weight = QuantSpec.parse(text), drawn(*SHAPE)
    if spec.kind != "nuq":
        return quantize(weight, fit_grid(weight, spec))
    column_of = column_index(spec, SHAPE[1], weight.device)
    if spec.dual:
        half = torch.arange(SHAPE[1]) % 3 % 2
        column_of = half if column_of is None else 2 * column_of + half
    row_of = torch.arange(SHAPE[0]) // 3 if spec.group_along == "outputs" else None
    levels = drawn(*grid_shape(spec, *SHAPE), spec.levels, seed=1)
    return quantize(weight, Codebook.of_levels(spec, levels, row_of, column_of))


def outliers_of(tensor: QTensor) -> Sparse:
    rest = drawn(*SHAPE) - tensor.dequantize()
    return Sparse.of(rest, rest.abs() > rest.abs().median())


def read(tensor: QTensor) -> Tensor:
    entry = describe_weight(tensor.layout)
    assert read_layout(entry) == tensor.layout
    return torch.from_numpy(decode(tensor.pack(), entry))


@pytest.mark.parametrize("text", FORMATS)
def test_the_independent_reader_decodes_every_format(text: str) -> None:
    tensor = stored(text)
    unpacked = QTensor.unpack(tensor.pack(), tensor.layout)
    assert torch.equal(unpacked.dequantize(), tensor.dequantize())
    assert torch.equal(read(tensor), tensor.dequantize())
    again = unpacked.pack()
    assert set(again) == set(tensor.pack())
    assert all(torch.equal(again[name], part) for name, part in tensor.pack().items())


@pytest.mark.parametrize("text", ["int4:asym", "nf4:g4:s8.4", "nuq2:g4:dual", "mxint3:g4"])
def test_outliers_are_added_to_what_the_codes_decode_to(text: str) -> None:
    tensor = stored(text)
    with_outliers = replace(tensor, sparse=outliers_of(tensor))
    assert torch.equal(read(with_outliers), with_outliers.dequantize())
    assert not torch.equal(read(with_outliers), tensor.dequantize())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("text", ["int4:asym", "nuq3"])
def test_a_low_rank_correction_is_added_too(text: str, dtype: str) -> None:
    tensor = stored(text)
    tensor = replace(tensor, sparse=outliers_of(tensor))
    corrected = replace(tensor, low_rank=LowRank.of(drawn(3, 12, seed=2), drawn(9, 3, seed=3), dtype))  # type: ignore[arg-type]
    torch.testing.assert_close(read(corrected), corrected.dequantize(), rtol=0, atol=1e-5)
    assert float((read(corrected) - tensor.dequantize()).abs().max()) > 0.1


def test_columns_that_do_not_lie_beside_their_group_are_found_again() -> None:
    tensor, order = stored("int3:g4:asym"), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert isinstance(tensor.grid, Grid) and tensor.grid.column_of is not None
    moved = QTensor(tensor.codes[:, order], replace(tensor.grid, column_of=tensor.grid.column_of[order]))
    assert moved.layout.regrouped and not tensor.layout.regrouped
    assert torch.equal(read(moved), tensor.dequantize()[:, order])
    assert torch.equal(QTensor.unpack(moved.pack(), moved.layout).dequantize(), tensor.dequantize()[:, order])
    assert moved.nbytes == tensor.nbytes + 12


def test_columns_and_groups_beyond_the_sign_bit_of_their_storage_are_read() -> None:
    """40,000 columns are numbered in 16 bits, 40,000 groups too."""
    weight = drawn(1, 40_000)
    tensor = quantize(weight, fit_grid(weight, QuantSpec.parse("int4:g1:asym")))
    assert isinstance(tensor.grid, Grid) and tensor.grid.column_of is not None
    order = torch.arange(40_000).flip(0)
    tensor = QTensor(tensor.codes[:, order], replace(tensor.grid, column_of=tensor.grid.column_of[order]))
    rest = weight[:, order] - tensor.dequantize() + 1
    mask = torch.zeros_like(rest, dtype=torch.bool)
    mask[:, [0, 32_767, 32_768, 39_999]] = True
    tensor = replace(tensor, sparse=Sparse.of(rest, mask))
    assert torch.equal(read(tensor), tensor.dequantize())
    assert torch.equal(QTensor.unpack(tensor.pack(), tensor.layout).dequantize(), tensor.dequantize())
