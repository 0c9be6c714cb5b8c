"""QTensor: what is stored decodes to exactly what was quantized, and its bytes are counted by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.low_rank import LowRank
from dither.formats.qtensor import QTensor, quantize
from dither.formats.sparse import Sparse
from dither.formats.spec import QuantSpec

SHAPE = (24, 36)
SHIFTS = ["sym", "asym", "narrow", "unsigned", "asym:tight", "asym:tight:clampzero", "asym:tight:realzero", "asym:pow2"]


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored(text: str, scale_dtype: str = "float16", shape: tuple[int, int] = SHAPE, offset: float = 0.0) -> QTensor:
    spec = QuantSpec.parse(text).model_copy(update={"scale_dtype": scale_dtype})
    weight = drawn(*shape) + offset
    return quantize(weight, fit_grid(weight, spec))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "g4", "g9", "g3:ic", "g24:ic", "dual"])
def test_unpacking_gives_back_codes_and_grid_exactly(granularity: str, shift: str, scale_dtype: str) -> None:
    before = stored(f"int3:{granularity}:{shift}", scale_dtype, offset=2.0 if "tight" in shift else 0.0)
    after = QTensor.unpack(before.pack(), before.layout)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.grid.scale, before.grid.scale)
    assert torch.equal(after.grid.zero_point, before.grid.zero_point)
    assert torch.equal(after.dequantize(), before.dequantize())
    assert (after.spec, after.shape) == (before.spec, SHAPE)


@pytest.mark.parametrize("shift", ["sym", "asym", "asym:tight"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_packs_and_unpacks_exactly(bits: int, shift: str) -> None:
    before = stored(f"int{bits}:{shift}", shape=(5, 13))
    assert torch.equal(QTensor.unpack(before.pack(), before.layout).dequantize(), before.dequantize())


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "g4", "g3:ic", "dual"])
def test_the_layout_says_what_pack_gives_and_its_bytes_are_counted(
    granularity: str, shift: str, scale_dtype: str
) -> None:
    tensor = stored(f"int5:{granularity}:{shift}", scale_dtype)
    parts = tensor.pack()
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == tensor.layout.tensors()
    assert tensor.nbytes == sum(part.numel() * part.element_size() for part in parts.values())


@pytest.mark.parametrize(
    ("text", "shape", "nbytes"),
    [
        ("int4", (8, 128), 8 * 64 + 8 * 2),
        ("int4:tensor", (8, 128), 8 * 64 + 2),
        ("int3", (2, 5), 2 * 2 + 2 * 2),
        ("int4:asym", (8, 128), 8 * 64 + 8 * 2 + 8),  # a row's one zero-point of 4 bits takes a byte
        ("int4:g32:asym", (8, 128), 8 * 64 + 8 * 4 * 2 + 8 * 2),  # four zero-points of 4 bits
        ("int4:g4:ic:asym", (8, 128), 8 * 64 + 2 * 128 * 2 + 2 * 64),
        ("int4:asym:tight", (8, 128), 8 * 64 + 8 * 2 + 8 * 4),
        ("int4:asym:tight:clampzero", (8, 128), 8 * 64 + 8 * 2 + 8),
        ("int4:asym:tight:realzero", (8, 128), 8 * 64 + 8 * 2 + 8 * 2),
        ("int4:dual:asym", (8, 128), 8 * 64 + 8 * 2 * 2 + 8 + 16),  # and 128 bits for the set of columns
    ],
)
def test_bytes_are_those_counted_by_hand(text: str, shape: tuple[int, int], nbytes: int) -> None:
    tensor = stored(text, shape=shape)
    assert tensor.nbytes == nbytes
    assert tensor.bits_per_weight == pytest.approx(8 * nbytes / (shape[0] * shape[1]))


def test_average_bits_of_usual_formats() -> None:
    assert stored("int4:g128", shape=(16, 256)).bits_per_weight == 4 + 16 / 128
    assert stored("int4:g128:asym", shape=(16, 256)).bits_per_weight == 4 + (16 + 4) / 128
    assert stored("int8", shape=(16, 256)).bits_per_weight == 8 + 16 / 256
    assert stored("int3:g16:asym:tight:realzero", "float32", (16, 256)).bits_per_weight == 3 + 64 / 16


@pytest.mark.parametrize(
    ("text", "outliers", "bits"),
    [
        ("int3:g16:asym:tight:realzero:s3.16", None, 3.625),  # b + (3 + 3) / 16 + 2 * 32 / (16 * 16)
        ("int3:g16:asym:tight:realzero:s3.16", 0.01, 3.945),  # and 32 bits for every hundredth weight
        ("int4:g16:asym:tight:realzero:s3.16", 0.002, 4.69),
        ("int2:g128:asym:tight:realzero:s3.16", None, 2.078),
    ],
)
def test_average_bits_of_spqr_are_those_of_its_formula(text: str, outliers: float | None, bits: float) -> None:
    """SpQR's count leaves out the row offsets, 32 bits a row, which are counted here."""
    shape = (64, 4096)  # eight groups of 3 bits fill whole bytes
    tensor = stored(text, shape=shape)
    if outliers is not None:
        mask = torch.zeros(shape, dtype=torch.bool).flatten()
        mask[: round(outliers * mask.numel())] = True
        tensor = replace(tensor, sparse=Sparse.of(torch.ones(shape), mask.reshape(shape)))
    offsets = 0 if outliers is None else 32 * 65 / (64 * 4096)
    assert tensor.bits_per_weight - offsets == pytest.approx(bits, abs=1.1e-3)
    assert tensor.bits_per_weight == pytest.approx(8 * sum(p.nbytes for p in tensor.pack().values()) / (64 * 4096))


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("nf4:g64", 4.25),
        ("nf4:g64:s8.256", 4 + 8 / 64 + 32 / (64 * 256)),  # double quantization
        ("mxint4:g32", 4.25),
        ("mxint3:g32", 3.25),
        ("mxint2:g16", 2.5),
    ],
)
def test_average_bits_of_block_formats(text: str, bits: float) -> None:
    assert stored(text, shape=(512, 256)).bits_per_weight == pytest.approx(bits, abs=1e-9)


def test_average_bits_of_tables_of_levels() -> None:
    spec = QuantSpec.parse("nuq3")
    book = Codebook.of_levels(spec, drawn(8, 8)[:, None])
    assert quantize(drawn(8, 4096), book).bits_per_weight == 3 + 8 * 16 / 4096
    spec = QuantSpec.parse("nuq2:g128:dual")  # BiLLM: four levels for each row, column block and class
    column_of = 2 * (torch.arange(256) // 128) + (torch.arange(256) % 5 == 0)
    book = Codebook.of_levels(spec, drawn(8, 16).reshape(8, 4, 4), None, column_of)
    assert quantize(drawn(8, 256), book).bits_per_weight == 2 + 4 * 4 * 16 / 256 + 1 / 8


def test_average_bits_of_a_correction() -> None:
    tensor = stored("int4:g128", shape=(256, 256))
    corrected = replace(tensor, low_rank=LowRank.of(drawn(8, 256), drawn(256, 8)))
    assert corrected.bits_per_weight - tensor.bits_per_weight == 8 * (256 + 256) * 16 / (256 * 256)
    corrected = replace(tensor, low_rank=LowRank.of(drawn(8, 256), drawn(256, 8), "int8"))
    assert corrected.bits_per_weight - tensor.bits_per_weight == (8 * (256 + 256) * 8 + 2 * 8 * 16) / (256 * 256)


def test_a_grid_without_the_codes_of_its_scales_is_not_stored() -> None:
    tensor = stored("int4:g4:s3.16")
    assert isinstance(tensor.grid, Grid)
    with pytest.raises(ShapeError, match="must bring the codes"):
        QTensor(tensor.codes, replace(tensor.grid, scale_codes=None)).pack()


def test_a_weight_on_the_grid_is_stored_without_loss() -> None:
    texts = ("int4", "int3:g4:asym", "int4:asym:tight:realzero", "int8:asym:dual", "nf4:g4", "mxint3:g4")
    for text in (*texts, "int3:g4:asym:realzero:s3.4", "nf4:s8.16"):
        tensor = stored(text)
        assert torch.equal(quantize(tensor.dequantize(), tensor.grid).codes, tensor.codes)
        assert torch.equal(quantize(tensor.dequantize(torch.float64), tensor.grid).codes, tensor.codes)


def test_values_come_in_the_asked_for_dtype_from_float32_arithmetic() -> None:
    tensor = stored("int4:asym")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(tensor.dequantize(dtype), tensor.dequantize().to(dtype))


def test_a_stored_tensor_that_is_missing_or_misshapen_is_named() -> None:
    tensor = stored("int4:asym")
    parts = tensor.pack()
    with pytest.raises(ShapeError, match=r"stored scale of int4:channel:asym for weight \(24, 36\).*got nothing"):
        QTensor.unpack({name: part for name, part in parts.items() if name != "scale"}, tensor.layout)
    with pytest.raises(ShapeError, match=r"stored codes .*expected \(24, 18\) torch.uint8, got \(23, 18\)"):
        QTensor.unpack(parts | {"codes": parts["codes"][1:]}, tensor.layout)
    with pytest.raises(ShapeError, match=r"expected \(24, 1\) torch.float16, got \(24, 1\) torch.float32"):
        QTensor.unpack(parts | {"scale": parts["scale"].float()}, tensor.layout)
