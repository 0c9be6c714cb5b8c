"""Grids: every granularity against a double loop over entries, and what must hold on any grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid, grid_shape, highest_code, implied_zero_point, lowest_code
from dither.formats.spec import QuantSpec

GRANULARITIES = ["tensor", "channel", "g1", "g3", "g6", "g2:ic", "g4:ic", "dual"]
SHIFTS = ["sym", "asym", "narrow", "unsigned", "asym:tight", "asym:tight:clampzero", "asym:tight:realzero", "asym:pow2"]


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cell_of(spec: QuantSpec, row: int, column: int, grid: Grid) -> tuple[int, int]:
    """Which scale an entry uses, by the words of the grammar alone."""
    if spec.granularity == "tensor":
        return 0, 0
    if spec.dual:
        assert grid.column_of is not None
        return row, int(grid.column_of[column])
    if spec.granularity == "channel":
        return row, 0
    size = spec.group_size or 1
    return (row // size, column) if spec.group_along == "outputs" else (row, column // size)


def naive_code(x: float, scale: float, zero_point: float, spec: QuantSpec, mode: str) -> int:
    rounder = {"nearest": round, "floor": math.floor, "ceil": math.ceil}[mode]
    code = rounder(x / scale + zero_point) if spec.zero_point == "real" else rounder(x / scale) + zero_point
    return int(min(max(code, 1 if spec.narrow else 0), 2**spec.bits - 1))


@pytest.mark.parametrize("mode", ["nearest", "floor", "ceil"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_and_values_are_those_of_a_loop_over_entries(granularity: str, shift: str, mode: str) -> None:
    spec = QuantSpec.parse(f"int3:{granularity}:{shift}")
    weight = drawn(8, 12)
    grid = fit_grid(weight, spec)
    assert grid.scale.shape == grid.zero_point.shape == grid_shape(spec, 8, 12)
    codes, values = grid.encode(weight, mode=mode), grid.round(weight, mode=mode)  # type: ignore[arg-type]
    for row in range(8):
        for column in range(12):
            cell = cell_of(spec, row, column, grid)
            scale, zero_point = float(grid.scale[cell]), float(grid.zero_point[cell])
            code = naive_code(float(weight[row, column]), scale, zero_point, spec, mode)
            assert code == int(codes[row, column])
            assert float(values[row, column]) == pytest.approx(scale * (code - zero_point), abs=1e-12)
    assert torch.equal(grid.decode(codes), values)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_some_columns_alone_get_what_they_get_in_the_whole(granularity: str) -> None:
    weight = drawn(8, 12)
    grid = fit_grid(weight, QuantSpec.parse(f"int3:{granularity}:asym"))
    codes, values = grid.encode(weight), grid.round(weight)
    for columns in (slice(2, 7), slice(0, 1), slice(11, None), torch.tensor([5, 0, 11, 3])):
        assert torch.equal(grid.encode(weight[:, columns], columns), codes[:, columns])
        assert torch.equal(grid.round(weight[:, columns], columns), values[:, columns])
        assert torch.equal(grid.decode(codes[:, columns], columns), values[:, columns])
        scale, zero_point = grid.cells(columns)
        assert torch.broadcast_shapes(scale.shape, codes[:, columns].shape) == codes[:, columns].shape
        assert zero_point.shape == scale.shape


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    granularity=st.sampled_from(GRANULARITIES),
    shift=st.sampled_from(["asym", "asym:tight", "asym:tight:realzero", "sym", "narrow"]),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 10**6),
)
def test_within_the_range_the_error_is_at_most_half_a_step(
    bits: int, granularity: str, shift: str, offset: float, seed: int
) -> None:
    spec = QuantSpec.parse(f"int{bits}:{granularity}:{shift}").model_copy(update={"scale_dtype": "float32"})
    weight = drawn(8, 12, seed) + offset
    grid = fit_grid(weight, spec)
    step = grid.cells()[0].expand(8, 12)
    assert bool(((grid.round(weight) - weight).abs() <= (0.5 + 1e-4) * step).all())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    granularity=st.sampled_from(GRANULARITIES),
    shift=st.sampled_from(SHIFTS),
    seed=st.integers(0, 10**6),
)
def test_values_on_the_grid_keep_their_codes(bits: int, granularity: str, shift: str, seed: int) -> None:
    if bits == 1 and shift == "narrow":
        return
    grid = fit_grid(drawn(8, 12, seed), QuantSpec.parse(f"int{bits}:{granularity}:{shift}"))
    codes = grid.encode(drawn(8, 12, seed + 1) * 2)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.encode(grid.decode(codes.float())), codes.float())
    assert codes.min() >= lowest_code(grid.spec) and codes.max() <= highest_code(grid.spec)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), shift=st.sampled_from(["sym", "asym", "narrow", "unsigned"]), seed=st.integers(0, 10**6))
def test_zero_is_exact_where_the_range_includes_it(bits: int, shift: str, seed: int) -> None:
    weight = drawn(8, 12, seed) + torch.linspace(-3, 3, 8)[:, None].double()
    grid = fit_grid(weight, QuantSpec.parse(f"int{bits}:channel:{shift}"))
    assert not bool(grid.round(torch.zeros_like(weight)).any())


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_narrow_grid_never_uses_its_lowest_code_and_is_symmetric(bits: int) -> None:
    weight = drawn(4, 50)
    grid = fit_grid(weight, QuantSpec.parse(f"int{bits}:narrow"))
    assert int(grid.encode(weight).min()) >= 1
    assert torch.equal(grid.round(-weight), -grid.round(weight))
    extremes = weight.abs().amax(dim=1)
    torch.testing.assert_close(grid.round(weight).abs().amax(dim=1), extremes, rtol=1e-3, atol=0)


def test_floor_and_ceiling_enclose_the_value_and_the_nearest_is_one_of_them() -> None:
    weight = drawn(8, 12)
    grid = fit_grid(weight, QuantSpec.parse("int8:asym").model_copy(update={"scale_dtype": "float32"}))
    low, near, high = (grid.round(weight, mode=mode) for mode in ("floor", "nearest", "ceil"))  # type: ignore[arg-type]
    step = grid.scale.expand_as(weight)
    inside = (weight > weight.amin(dim=1, keepdim=True) + step) & (weight < weight.amax(dim=1, keepdim=True) - step)
    assert bool((low <= weight)[inside].all() and (weight <= high)[inside].all())
    assert bool(((near == low) | (near == high)).all())
    torch.testing.assert_close((high - low)[inside], step[inside], rtol=1e-6, atol=0)


def test_a_group_that_does_not_divide_names_the_next_that_does() -> None:
    with pytest.raises(ShapeError, match="group size 8 of int4:g8 does not divide 12 inputs; the next that does is g6"):
        fit_grid(drawn(8, 12), QuantSpec.parse("int4:g8"))
    with pytest.raises(ShapeError, match="does not divide 9 outputs; the next that does is g3"):
        fit_grid(drawn(9, 12), QuantSpec.parse("int4:g4:ic"))
    with pytest.raises(ShapeError, match="the next that does is g12"):
        fit_grid(drawn(9, 12), QuantSpec.parse("int4:g128"))


def test_implied_zero_points_lie_in_the_middle_or_at_the_bottom() -> None:
    assert [implied_zero_point(QuantSpec(bits=bits)) for bits in (1, 2, 4, 8)] == [0.5, 2, 8, 128]
    assert implied_zero_point(QuantSpec(bits=4, symmetry="unsigned")) == 0


def test_a_grid_fitted_in_float64_serves_float32_without_changing_its_dtype() -> None:
    weight = drawn(3, 4)
    grid = fit_grid(weight, QuantSpec.parse("int4"))
    assert grid.round(weight.float()).dtype == torch.float32
    assert grid.codes(weight).dtype == torch.uint8
    assert torch.equal(grid.codes(weight.float()), grid.codes(weight))
