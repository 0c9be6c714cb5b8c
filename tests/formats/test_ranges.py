"""Ranges: the published conventions as formulas, searches against plain loops, degenerate inputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import SpecError
from dither.formats.grid import decode, encode
from dither.formats.ranges import affine, quantiles, search_range
from dither.formats.spec import WEIGHT_PERCENTILES, QuantSpec


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def free(text: str) -> QuantSpec:
    """A format whose scales are stored in float32, so that they follow the formulas closely."""
    return QuantSpec.parse(text).model_copy(update={"scale_dtype": "float32"})


def rounded(cells: Tensor, spec: QuantSpec, low: Tensor, high: Tensor) -> Tensor:
    scale, zero_point = (part[:, None] for part in affine(low, high, spec))
    return decode(encode(cells, scale, zero_point, spec), scale, zero_point)


RANGES = [(-1.0, 3.0), (-5.0, -1.0), (2.0, 3.0), (-0.1, 0.11), (-7.0, 0.0), (0.0, 1e-3)]


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_forces_the_range_through_zero_and_rounds_the_zero_point(low: float, high: float, bits: int) -> None:
    scale, zero_point = affine(torch.tensor([low]).double(), torch.tensor([high]).double(), free(f"int{bits}:asym"))
    bottom, top, codes = min(low, 0.0), max(high, 0.0), 2**bits - 1
    assert scale.item() == pytest.approx((top - bottom) / codes, rel=1e-6)
    assert zero_point.item() == pytest.approx(round(-bottom / ((top - bottom) / codes)))


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_awq_keeps_the_true_range_and_clamps_the_zero_point_into_the_codes(low: float, high: float) -> None:
    spec = free("int4:asym:tight:clampzero")
    scale, zero_point = affine(torch.tensor([low]).double(), torch.tensor([high]).double(), spec)
    assert scale.item() == pytest.approx((high - low) / 15, rel=1e-6)
    assert zero_point.item() == min(max(-round(low / ((high - low) / 15)), 0), 15)


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_spqr_and_hqq_keep_the_true_range_and_a_real_zero_point(low: float, high: float) -> None:
    spec = free("int3:asym:tight:realzero")
    scale, zero_point = affine(torch.tensor([low]).double(), torch.tensor([high]).double(), spec)
    assert scale.item() == pytest.approx((high - low) / 7, rel=1e-6)
    assert zero_point.item() == pytest.approx(-low / ((high - low) / 7), rel=1e-6)
    x = torch.linspace(low, high, 23).double()
    expected = (x / scale + zero_point).round().clamp(0, 7)  # the zero-point is added before the rounding
    assert torch.equal(encode(x, scale, zero_point, spec), expected)


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_gptqs_symmetric_scale_is_two_absolute_maxima_over_all_codes(low: float, high: float) -> None:
    scale, zero_point = affine(torch.tensor([low]).double(), torch.tensor([high]).double(), free("int4:sym"))
    assert scale.item() == pytest.approx(2 * max(abs(low), abs(high)) / 15, rel=1e-6)
    assert zero_point.item() == 8


def test_narrow_and_unsigned_grids_follow_their_formulas() -> None:
    low, high = torch.tensor([-2.0]).double(), torch.tensor([3.0]).double()
    scale, zero_point = affine(low, high, free("int4:narrow"))
    assert (scale.item(), zero_point.item()) == (pytest.approx(3 / 7, rel=1e-6), 8)
    scale, zero_point = affine(low, high, free("int4:unsigned"))
    assert (scale.item(), zero_point.item()) == (pytest.approx(3 / 15, rel=1e-6), 0)


def test_one_bit_symmetric_codes_are_the_two_signs() -> None:
    spec = free("int1")
    cells = torch.tensor([[-3.0, -0.1, 0.2, 1.0]]).double()
    values = rounded(cells, spec, *search_range(cells, spec))
    torch.testing.assert_close(values, torch.tensor([[-3.0, -3.0, 3.0, 3.0]]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["int4", "int4:asym", "int3:narrow", "int4:asym:tight:realzero", "int2:unsigned"])
def test_a_power_of_two_scale_is_the_next_power_above_the_free_one(text: str) -> None:
    low, high = -drawn(200).abs() * 10, drawn(200, seed=1).abs() * 0.01
    plain, _ = affine(low, high, free(text))
    scale, _ = affine(low, high, free(f"{text}:pow2"))
    assert scale.tolist() == [2.0 ** math.ceil(math.log2(value)) for value in plain.tolist()]
    exact = torch.tensor([2.0**k * 15 for k in range(-10, 5)]).double()
    scale, _ = affine(torch.zeros_like(exact), exact, free("int4:asym:pow2"))
    assert scale.tolist() == [2.0**k for k in range(-10, 5)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_survives_its_storage_dtype_unchanged(dtype: torch.dtype) -> None:
    spec = QuantSpec(scale_dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
    span = drawn(50).abs() * 10.0 ** torch.arange(-9, 1).repeat(5)
    scale, _ = affine(-span, span, spec)
    assert torch.equal(scale.to(dtype).to(scale.dtype), scale)
    assert bool((scale > 0).all())


def test_scales_of_activations_are_not_rounded_to_the_storage_dtype() -> None:
    low, high = torch.tensor([-1e-9, -1.0]), torch.tensor([2e-9, 1e7])
    scale, _ = affine(low, high, QuantSpec.parse("int8:tensor:asym"), stored=False)
    torch.testing.assert_close(scale, (high - low) / 255, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("text", "low", "high"), [("int4", -1e7, 1.0), ("int4:asym", 0.0, 1e7), ("int4:asym:tight:realzero", 30.0, 30.001)]
)
def test_a_scale_or_zero_point_beyond_its_dtype_is_an_error_and_not_infinite(
    text: str, low: float, high: float
) -> None:
    with pytest.raises(SpecError, match="does not fit into float16; use scale_dtype float32"):
        affine(torch.tensor([low]), torch.tensor([high]), QuantSpec.parse(text))
    affine(torch.tensor([low]), torch.tensor([high]), free(text))


@pytest.mark.parametrize(
    "text",
    ["int4", "int4:asym", "int4:asym:tight:clampzero", "int4:asym:tight:realzero", "int4:asym:tight", "int4:narrow"],
)
@pytest.mark.parametrize("value", [0.0, 1.7, -1.7, 1e-6, 300.0])
def test_a_constant_is_kept(text: str, value: float) -> None:
    cells = torch.full((1, 5), value, dtype=torch.float64)
    spec = free(text)
    values = rounded(cells, spec, *search_range(cells, spec))
    # the lower half of a full symmetric grid reaches the extreme, the upper is half a step short
    step = float(affine(*search_range(cells, spec), spec)[0]) if text == "int4" else 0.0
    torch.testing.assert_close(values, cells, rtol=1e-6, atol=0.5 * step)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", ["asym", "asym:tight", "asym:tight:realzero", "sym", "unsigned", "asym:pow2"])
def test_zeros_alone_give_a_finite_scale_and_stay_zeros(bits: int, tokens: str) -> None:
    spec = QuantSpec.parse(f"int{bits}:{tokens}")
    cells = torch.zeros(2, 3)
    scale, zero_point = affine(*search_range(cells, spec), spec)
    assert bool(torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero_point).all())
    if bits == 1 and tokens == "sym":
        return  # the two codes are the two signs
    assert rounded(cells, spec, *search_range(cells, spec)).tolist() == cells.tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_quantiles_are_numpys(count: int, seed: int) -> None:
    cells = drawn(3, count, seed=seed)
    for shares in ([1 - p for p in WEIGHT_PERCENTILES], list(WEIGHT_PERCENTILES)):
        found = torch.stack(quantiles(cells, shares)).numpy()
        np.testing.assert_allclose(found, np.quantile(cells.numpy(), shares, axis=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("text", ["int3:asym", "int4:sym", "int4:asym:tight:realzero"])
def test_the_percentile_search_takes_the_best_of_its_list_for_each_cell(text: str) -> None:
    cells, shares = drawn(20, 300), (0.9, 0.97, 0.999, 1.0)
    spec = free(f"{text}:percentile").model_copy(update={"percentiles": shares})
    low, high = search_range(cells, spec)
    for row in range(len(cells)):
        cell, errors = cells[row : row + 1], {}
        for share in shares:
            ends = (torch.quantile(cell, q, dim=1) for q in (1 - share, share))
            errors[share] = float((rounded(cell, spec, *ends) - cell).square().mean())
        mine = float((rounded(cell, spec, low[row : row + 1], high[row : row + 1]) - cell).square().mean())
        assert mine == pytest.approx(min(errors.values()), rel=1e-9)
    assert len(set(low.tolist())) == len(cells)


@pytest.mark.parametrize("text", ["int3:asym", "int4:sym", "int2:asym:tight:realzero"])
def test_the_mse_search_takes_the_best_shrink_for_the_norm_of_gptq_and_beats_the_extremes(text: str) -> None:
    cells = drawn(6, 80) ** 3
    spec, plain = free(f"{text}:mse"), free(text)

    def error(cell: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return (rounded(cell, plain, low, high) - cell).abs().pow(2.4).mean(dim=1)

    found = error(cells, *search_range(cells, spec))
    low, high = cells.amin(dim=1), cells.amax(dim=1)
    every = torch.stack([error(cells, low * (1 - i / 100), high * (1 - i / 100)) for i in range(80)])
    torch.testing.assert_close(found, every.amin(dim=0), rtol=1e-9, atol=0)
    assert bool((found <= every[0]).all() and (found < every[0]).any())


def test_a_search_judges_candidates_by_the_scales_that_will_be_used() -> None:
    spec = QuantSpec.parse("int8:tensor:asym:percentile")
    cells = drawn(1, 1000).float() * 1e9  # beyond float16 as a stored scale
    scale, _ = affine(*search_range(cells, spec, stored=False), spec, stored=False)
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_negative_weight_gets_the_outer_code_in_every_symmetric_cell(bits: int, dtype: str) -> None:
    spec = QuantSpec.parse(f"int{bits}:channel:sym:minmax").model_copy(update={"scale_dtype": dtype})
    largest = drawn(500, 1).float().abs() + 1e-3
    scale, zero_point = affine(-largest[:, 0], largest[:, 0] / 2, spec)
    exact = largest[:, 0] / ((2**bits - 1) / 2)
    assert bool((scale <= exact).all()) and bool((scale >= exact * (1 - 2.0**-7)).all())
    if dtype != "float32":  # where a quotient may fall short of the half by its own rounding
        assert bool((encode(-largest, scale[:, None], zero_point[:, None], spec) == 0).all())
