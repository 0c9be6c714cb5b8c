"""Scales of scales: against a loop over groups, and what must hold of every group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.errors import SpecError
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.second_level import SecondLevel
from dither.formats.spec import QuantSpec


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 5), size=st.integers(1, 16), bits=st.integers(1, 8),
    offset=st.sampled_from([-3.0, 0.0, 0.5, 40.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_each_group_of_rows_lies_on_a_grid_between_its_own_extremes(
    rows: int, columns: int, size: int, bits: int, offset: float, seed: int
) -> None:
    values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + offset
    found = SecondLevel.of(values, bits, size, positive=False).decode()
    for start in range(0, rows, size):
        group, decoded = values[start : start + size], found[start : start + size]
        low, high = group.amin(dim=0), group.amax(dim=0)
        half_a_step = 0.5 * (high - low) / (2**bits - 1)
        of_float16 = 2.0**-10 * (group.abs().amax() + 1e-3)  # offset and step are rounded to float16
        assert bool(((decoded - group).abs() <= half_a_step + of_float16).all())


def test_a_column_of_equal_values_stays_equal() -> None:
    values = torch.full((20, 2), 0.25)
    assert torch.equal(SecondLevel.of(values, 3, 16, positive=True).decode(), values)


def test_decoded_scales_are_never_zero() -> None:
    found = SecondLevel.of(torch.tensor([[0.0], [1e-9], [1.0]]), 2, 16, positive=True).decode()
    assert float(found.min()) > 0 and float(found.max()) == pytest.approx(1, abs=1e-3)


def test_joined_parts_are_those_of_the_whole() -> None:
    values = torch.rand(10, 6, generator=torch.Generator().manual_seed(0))
    whole = SecondLevel.of(values, 3, 4, positive=True)
    parts = [SecondLevel.of(values[:, [k]], 3, 4, positive=True) for k in range(6)]
    assert torch.equal(SecondLevel.joined(parts).decode(), whole.decode())
    assert torch.equal(SecondLevel.joined(parts).codes, whole.codes)


def test_a_zero_point_beyond_float16_is_refused() -> None:
    weight = torch.linspace(100.0, 100.001, 64)[None].expand(4, -1)
    with pytest.raises(SpecError, match="does not fit"):
        fit_grid(weight, QuantSpec.parse("int4:g16:asym:tight:realzero:s3.4"))


@pytest.mark.parametrize("zero", ["zeroin", "tight:realzero", "tight:clampzero", "tight"])
def test_zero_points_follow_from_the_scales_as_they_are_stored(zero: str) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    plain, coarse = (fit_grid(weight, QuantSpec.parse(f"int4:g16:asym:{zero}{s}")) for s in ("", ":s8.16"))
    assert isinstance(plain, Grid) and isinstance(coarse, Grid)
    torch.testing.assert_close(coarse.scale, plain.scale, rtol=0.02, atol=0)
    assert float((coarse.zero_point - plain.zero_point).abs().max()) <= (0.1 if "real" in zero else 1)
    error = (coarse.round(weight) - weight).square().mean() / (plain.round(weight) - weight).square().mean()
    assert float(error) < 1.01
