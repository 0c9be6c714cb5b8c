"""Fitting: each cell's scale comes from its own values, and the dual grid finds the outlier columns."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import SpecError
from dither.formats.fit import fit_grid, outlier_columns
from dither.formats.qtensor import QTensor, quantize
from dither.formats.ranges import affine, search_range
from dither.formats.spec import QuantSpec


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_cells(weight: Tensor, spec: QuantSpec) -> dict[tuple[int, int], Tensor]:
    """The values of each cell [R, C], cut out one by one."""
    rows, columns = weight.shape
    if spec.granularity == "tensor":
        return {(0, 0): weight.flatten()}
    if spec.granularity == "channel":
        return {(row, 0): weight[row] for row in range(rows)}
    size = spec.group_size or 1
    if spec.group_along == "inputs":
        return {(r, c): weight[r, c * size : (c + 1) * size] for r in range(rows) for c in range(columns // size)}
    return {(r, c): weight[r * size : (r + 1) * size, c] for r in range(rows // size) for c in range(columns)}


@pytest.mark.parametrize("search", ["minmax", "percentile"])
@pytest.mark.parametrize("shift", ["sym", "asym:tight:realzero"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "g2", "g6", "g2:ic", "g4:ic"])
def test_each_cell_is_fitted_to_its_own_values(granularity: str, shift: str, search: str) -> None:
    spec = QuantSpec.parse(f"int3:{granularity}:{shift}:{search}")
    weight = drawn(4, 6)
    grid = fit_grid(weight, spec)
    for cell, values in naive_cells(weight, spec).items():
        scale, zero_point = affine(*search_range(values[None], spec), spec)
        assert float(grid.scale[cell]) == float(scale)
        assert float(grid.zero_point[cell]) == float(zero_point)


def naive_outliers(weight: Tensor) -> set[int]:
    """As released: count in how many rows a column is beyond the row's percentiles, take the most frequent."""
    counts: Counter[int] = Counter()
    for row in weight.numpy():
        positive, negative = row[row > 0], row[row < 0]
        high = np.percentile(positive, 99) if len(positive) else np.inf
        low = np.percentile(negative, 1) if len(negative) else -np.inf
        counts.update(c for c, value in enumerate(row) if value > high or value < low)
    ranked = sorted(range(weight.shape[1]), key=lambda column: (-counts[column], column))
    return set(ranked[: max(1, min(weight.shape[0] // 20, weight.shape[1] - 1))])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 90), columns=st.integers(2, 30), seed=st.integers(0, 10**6), positive=st.booleans())
def test_the_outlier_columns_are_those_most_often_beyond_their_rows_percentiles(
    rows: int, columns: int, seed: int, positive: bool
) -> None:
    weight = drawn(rows, columns, seed)
    weight = weight.abs() if positive else weight
    assert set(outlier_columns(weight).nonzero().flatten().tolist()) == naive_outliers(weight)


def test_ties_between_outlier_columns_go_to_the_lower_column() -> None:
    weight = torch.zeros(40, 10)
    assert outlier_columns(weight).nonzero().flatten().tolist() == [0, 1]
    weight = torch.arange(1.0, 11.0).repeat(40, 1)
    weight[:20, 3] = 50.0
    weight[20:, 7] = 50.0
    assert outlier_columns(weight).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize(("rows", "columns", "count"), [(40, 30, 2), (19, 30, 1), (400, 8, 7), (60, 2, 1), (60, 1, 0)])
def test_there_is_one_outlier_column_for_twenty_rows_and_never_all_columns(rows: int, columns: int, count: int) -> None:
    assert int(outlier_columns(drawn(rows, columns)).sum()) == count


@pytest.mark.parametrize("search", ["minmax", "percentile"])
def test_the_dual_grid_fits_both_sides_on_their_own(search: str) -> None:
    spec = QuantSpec.parse(f"int4:asym:dual:{search}")
    weight = drawn(40, 30)
    weight[:, [4, 9]] *= 20
    grid = fit_grid(weight, spec)
    assert grid.column_of is not None and grid.column_of.nonzero().flatten().tolist() == [4, 9]
    single = spec.model_copy(update={"dual": False})
    for side in (0, 1):
        alone = fit_grid(weight[:, grid.column_of == side], single)
        assert torch.equal(grid.scale[:, side], alone.scale[:, 0])
        assert torch.equal(grid.zero_point[:, side], alone.zero_point[:, 0])
    inner = weight[:, grid.column_of == 0]
    error = (grid.round(weight) - weight)[:, grid.column_of == 0].square().mean()
    assert float(error) < 0.1 * float(
        (fit_grid(weight, single).round(weight)[:, grid.column_of == 0] - inner).square().mean()
    )


def test_a_dual_grid_of_one_column_is_the_single_grid_twice() -> None:
    weight = drawn(40, 1)
    grid = fit_grid(weight, QuantSpec.parse("int4:asym:dual"))
    assert torch.equal(grid.round(weight), fit_grid(weight, QuantSpec.parse("int4:asym")).round(weight))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "g1", "g1:ic", "dual"])
@pytest.mark.parametrize("shift", ["sym", "asym", "asym:tight", "asym:tight:clampzero", "asym:tight:realzero"])
def test_extreme_weights_give_finite_grids(granularity: str, shift: str) -> None:
    outlier = torch.full((4, 5), 1e-4)
    outlier[2, 3] = -1e4
    inputs = [torch.zeros(4, 5), torch.full((4, 5), 2.5), drawn(4, 5).float().abs(), -drawn(4, 5).float().abs()]
    for weight in (*inputs, outlier, torch.full((4, 1), -1e-3), torch.full((1, 1), 7.0), torch.full((4, 5), 1e-12)):
        grid = fit_grid(weight, QuantSpec.parse(f"int4:{granularity}:{shift}"))
        values = grid.round(weight)
        assert bool(torch.isfinite(grid.scale).all() and (grid.scale > 0).all() and torch.isfinite(values).all())
        assert float((values - weight).abs().max()) <= float(weight.abs().max()) + 1e-6


@pytest.mark.parametrize("text", ["int4:token", "log2-4", "logsqrt2-4:tensor", "twin4:tensor"])
def test_a_format_that_cannot_hold_a_weight_is_refused(text: str) -> None:
    with pytest.raises(
        SpecError, match=r"weights need a uniform format per tensor, channel or group, got .*; try int4"
    ):
        fit_grid(drawn(4, 4), QuantSpec.parse(text))


@pytest.mark.parametrize("bits", range(2, 9))
def test_shared_exponents_follow_the_formula_of_block_floating_point(bits: int) -> None:
    """e = floor(log2(max |x|)), m = min(round(|x| / 2^e * 2^(b-2)), 2^(b-1) - 1), x̂ = sign m 2^e / 2^(b-2)."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 6)[:, None]
    weight[0, :16] = 0
    weight[1, 16:32] = torch.tensor([4.0, -4.0, 1.0, 0.5]).repeat(4)  # a power of two is its own floor
    found = fit_grid(weight, QuantSpec.parse(f"mxint{bits}:g16")).round(weight)
    for row in range(6):
        for start in range(0, 64, 16):
            block = [float(x) for x in weight[row, start : start + 16]]
            top = max(abs(x) for x in block)
            unit = 2.0 ** (math.floor(math.log2(top)) - (bits - 2)) if top else 1.0
            expected = [math.copysign(min(round(abs(x) / unit), 2 ** (bits - 1) - 1) * unit, x) for x in block]
            assert found[row, start : start + 16].tolist() == expected


def test_shared_exponents_hold_the_largest_and_the_smallest_blocks() -> None:
    weight = torch.tensor([[3.0e38, -1.0], [1.2e-38, 0.0], [1e-45, 0.0], [0.0, 0.0]])
    tensor = quantize(weight, fit_grid(weight, QuantSpec.parse("mxint8:g2")))
    found = QTensor.unpack(tensor.pack(), tensor.layout).dequantize()
    assert torch.equal(found, tensor.dequantize()) and bool(found.isfinite().all())
    assert float(found[0, 0]) == pytest.approx(3.0e38, rel=0.01)
    assert not bool(found[2:].any())
