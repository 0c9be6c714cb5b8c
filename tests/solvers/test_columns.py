"""Column-by-column rounding against its definition: fix a column, solve the others again, go on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import NumericalError
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import QuantSpec
from dither.solvers import columns as module
from dither.solvers.columns import column_order, lazy_blocks, round_by_columns, round_by_groups
from dither.solvers.outliers import filled_with_mean

TEXTS = ["int3:asym", "int2:g2:asym", "int4", "int3:dual", "int3:g2:ic", "int3:tensor:asym:tight:realzero"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, columns: int, ones: bool = False, seed: int = 0) -> Tensor:
    x = drawn(rows, columns, seed=seed) @ (drawn(columns, columns, seed=seed + 1) + torch.eye(columns))
    x = x + 0.3
    return torch.cat([x, torch.ones(rows, 1, dtype=x.dtype)], dim=1) if ones else x


def redone(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid | Codebook,
    order: list[int],
    columns: int,
    kept: Tensor | None = None,
    size: int | None = None,
) -> Tensor:
    """After every rounding all open columns are solved again from the start, by the normal equations.

    With `size`, every so many columns get a grid of their own, fitted to what they have become.
    """
    current, fixed, H, spec = weight.clone(), [], hessian, grid.spec
    kept = torch.zeros_like(weight[:, :columns], dtype=torch.bool) if kept is None else kept
    for place, column in enumerate(order[:columns]):
        index = torch.tensor([column])
        if size is not None and place % size == 0:
            group = order[place : min(place + size, columns)]
            grid = alone(filled_with_mean(current[:, group], kept[:, group]), spec)
        place_of = index if size is None else torch.tensor([0])
        rounded = grid.round(current[:, index], place_of)
        current[:, index] = torch.where(kept[:, index], current[:, index], rounded)
        fixed.append(column)
        left = [c for c in order if c not in fixed]
        if left:
            change = current[:, fixed] - weight[:, fixed]
            solved = torch.linalg.solve(H[left][:, left], H[left][:, fixed] @ change.T)
            current[:, left] = weight[:, left] - solved.T
    return current


def alone(group: Tensor, spec: QuantSpec) -> Grid | Codebook:
    """The grid of one group: one cell a row."""
    return fit_grid(group, spec.model_copy(update={"granularity": "channel", "group_size": None}))


def table(weight: Tensor, text: str, seed: int = 9) -> Codebook:
    """Levels drawn for every cell of a format, with half of the columns in each class if it is dual."""
    spec, (rows, columns) = QuantSpec.parse(text), weight.shape
    column_of = torch.arange(columns) // spec.group_size if spec.group_size else torch.zeros(columns, dtype=torch.long)
    column_of = column_of * 2 + torch.arange(columns) % 2 if spec.dual else column_of
    return Codebook.of_levels(spec, drawn(rows, int(column_of.max()) + 1, spec.levels, seed=seed), None, column_of)


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@settings(max_examples=40, deadline=None)
@given(
    o=st.sampled_from([2, 4, 40]), pairs=st.integers(1, 5), ones=st.booleans(), text=st.sampled_from(TEXTS),
    act_order=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_result_is_that_of_solving_the_open_columns_again_after_every_rounding(
    o: int, pairs: int, ones: bool, text: str, act_order: bool, seed: int
) -> None:
    i = 2 * pairs
    x, weight = inputs(50, i, ones, seed), drawn(o, i + ones, seed=seed + 2)
    gram, grid = x.T @ x, fit_grid(weight[:, :i], QuantSpec.parse(text))
    found = round_by_columns(weight, gram, grid, i, 0.01, act_order)
    order = sorted(range(i), key=lambda c: -float(gram[c, c])) if act_order else list(range(i))
    order += range(i, i + ones)
    expected = redone(weight, damped(gram, 0.01), grid, order, i)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-8)
    assert found.notes == {"damping": 0.01, "tries": 1.0}


@settings(max_examples=40, deadline=None)
@given(
    o=st.sampled_from([2, 5]), pairs=st.integers(1, 5), ones=st.booleans(), share=st.sampled_from([0.0, 0.3, 1.0]),
    text=st.sampled_from(["int3:asym", "nf4:g2", "fp4", "nuq2", "nuq1:g2", "nuq2:g2:dual"]), act_order=st.booleans(),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_codebooks_and_kept_weights_are_swept_alike(
    o: int, pairs: int, ones: bool, share: float, text: str, act_order: bool, seed: int
) -> None:
    i = 2 * pairs
    x, weight = inputs(50, i, ones, seed), drawn(o, i + ones, seed=seed + 2)
    gram, kept = x.T @ x, drawn(o, i, seed=seed + 3).abs() < share * 3
    grid = table(weight[:, :i], text) if text[:3] == "nuq" else fit_grid(weight[:, :i], QuantSpec.parse(text))
    found = round_by_columns(weight, gram, grid, i, 0.01, act_order, kept)
    order = column_order(gram, i, act_order).tolist()
    expected = redone(weight, damped(gram, 0.01), grid, order, i, kept)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-8)
    assert found.grid is grid


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4), ones=st.booleans(), share=st.sampled_from([0.0, 0.3]), size=st.integers(1, 6),
    kind=st.sampled_from(["int3", "int2", "nf4"]), act_order=st.booleans(), seed=st.integers(0, 10**6),
    block=st.sampled_from([1, 2, 4, 64]),
)  # fmt: skip
def test_a_grid_fitted_on_the_way_sees_every_compensation_made_before(
    groups: int, ones: bool, share: float, size: int, kind: str, act_order: bool, seed: int, block: int
) -> None:
    i = groups * size
    x, weight = inputs(50, i, ones, seed), drawn(3, i + ones, seed=seed + 2)
    spec = QuantSpec.parse(f"{kind}:g{size}" + (":asym:tight:realzero" if kind != "nf4" else ""))
    gram, kept = x.T @ x, drawn(3, i, seed=seed + 3).abs() < share * 3
    order = column_order(gram, i, act_order).tolist()
    seen: list[int] = []

    def fit(group: Tensor, columns: Tensor) -> Grid | Codebook:
        seen.extend(columns.tolist())
        return alone(group, spec)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "BLOCK", block)
        found = round_by_groups(weight, gram, fit, spec, i, 0.01, act_order, kept)
    grid = alone(weight[:, :i], spec)
    expected = redone(weight, damped(gram, 0.01), grid, order, i, kept, size)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-8)
    assert seen == order[:i]
    on_grid = torch.where(kept, found.weight[:, :i], found.grid.round(found.weight[:, :i]))
    torch.testing.assert_close(on_grid, found.weight[:, :i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
def test_groups_along_the_outputs_are_fitted_column_by_column(act_order: bool) -> None:
    weight, x, spec = drawn(6, 10), inputs(60, 10), QuantSpec.parse("int3:g3:ic:asym:tight:realzero")
    gram = x.T @ x
    found = round_by_groups(weight, gram, lambda column, _: fit_grid(column, spec), spec, 10, 0.01, act_order)
    current, H = weight.clone(), damped(gram, 0.01)
    order = column_order(gram, 10, act_order).tolist()
    for place, column in enumerate(order):
        rounded = fit_grid(current[:, [column]], spec).round(current[:, [column]])
        error, left = rounded - current[:, [column]], order[place + 1 :]
        if left:
            inverse = torch.linalg.inv(H[order[place:]][:, order[place:]])
            current[:, left] += error @ inverse[:1, 1:] / inverse[0, 0]
        current[:, [column]] = rounded
    torch.testing.assert_close(found.weight, current, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.grid.round(found.weight), found.weight, rtol=0, atol=1e-12)
    stored = quantize(found.weight.float(), found.grid)
    assert torch.equal(QTensor.unpack(stored.pack(), stored.layout).dequantize(), stored.dequantize())
    torch.testing.assert_close(stored.dequantize().double(), found.weight, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), size=st.integers(1, 300))
def test_lazy_blocks_cover_every_place_and_no_group_is_entered_before_it_is_complete(count: int, size: int) -> None:
    blocks = list(lazy_blocks(count, size))
    assert [place for start, stop in blocks for place in range(start, stop)] == list(range(count))
    assert all(0 < stop - start <= module.BLOCK for start, stop in blocks)
    for first in range(0, count, size):
        (start, stop), *_ = [block for block in blocks if block[0] <= first < block[1]]
        assert first == start or min(first + size, count) <= stop


def test_groups_fitted_on_the_way_beat_those_of_the_original_weight() -> None:
    x, spec = inputs(300, 32), QuantSpec.parse("int2:g8:asym:tight:realzero")
    gram, errors = x.T @ x, {"static": 0.0, "dynamic": 0.0}
    for seed in range(5):
        weight = drawn(24, 32, seed=seed)
        static = round_by_columns(weight, gram, fit_grid(weight, spec), 32, 0.01, act_order=False).weight
        dynamic = round_by_groups(weight, gram, lambda group, _: alone(group, spec), spec, 32, 0.01, False).weight
        for name, found in (("static", static), ("dynamic", dynamic)):
            errors[name] += float((x @ (found - weight).T).square().sum())
    assert errors["dynamic"] < 0.9 * errors["static"]


def test_kept_outliers_lower_the_error_and_take_part_in_compensation() -> None:
    weight, x = drawn(8, 16), inputs(200, 16)
    gram, grid = x.T @ x, fit_grid(weight, QuantSpec.parse("int2:asym"))
    kept = torch.zeros(8, 16, dtype=torch.bool)
    kept[:, ::5] = True
    plain = round_by_columns(weight, gram, grid, 16, 0.01, False).weight
    found = round_by_columns(weight, gram, grid, 16, 0.01, False, kept).weight
    assert bool((found - weight)[:, 5].abs().gt(0).any())  # compensated, so not what it was
    errors = [float((x @ (one - weight).T).square().sum()) for one in (found, plain)]
    assert errors[0] < 0.75 * errors[1]  # measured: 0.66
    everything = round_by_columns(weight, gram, grid, 16, 0.01, True, torch.ones_like(kept)).weight
    torch.testing.assert_close(everything, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", TEXTS)
def test_with_a_diagonal_gram_it_is_rounding_to_nearest(text: str) -> None:
    weight, gram = drawn(4, 6), torch.diag(torch.arange(1.0, 7.0).double())
    grid = fit_grid(weight, QuantSpec.parse(text))
    for act_order in (True, False):
        found = round_by_columns(weight, gram, grid, 6, 0.01, act_order).weight
        torch.testing.assert_close(found, grid.round(weight), rtol=0, atol=1e-12)


def test_every_rounded_column_is_on_the_grid_and_the_output_error_beats_nearest() -> None:
    weight, x = drawn(16, 24), inputs(200, 24)
    gram, grid = x.T @ x, fit_grid(weight, QuantSpec.parse("int3:asym"))
    nearest = (x @ (grid.round(weight) - weight).T).square().sum()
    for act_order in (True, False):
        found = round_by_columns(weight, gram, grid, 24, 0.01, act_order).weight
        torch.testing.assert_close(grid.round(found), found, rtol=0, atol=1e-12)
        assert float((x @ (found - weight).T).square().sum()) < 0.6 * float(nearest)


def test_the_width_of_the_lazy_block_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = drawn(5, 11), inputs(60, 10, ones=True)
    grid = fit_grid(weight[:, :10], QuantSpec.parse("int3:asym"))
    results = []
    for block in (1, 3, 10, 64):
        monkeypatch.setattr(module, "BLOCK", block)
        results.append(round_by_columns(weight, x.T @ x, grid, 10, 0.01, act_order=True).weight)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-10)


def test_act_order_of_permuted_columns_gives_the_permuted_result() -> None:
    weight, x = drawn(5, 8), inputs(60, 8) * torch.arange(1, 9)
    grid, spec = fit_grid(weight, QuantSpec.parse("int3:asym")), QuantSpec.parse("int3:asym")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    plain = round_by_columns(weight, x.T @ x, grid, 8, 0.01, act_order=True).weight
    moved = x[:, order]
    permuted = round_by_columns(weight[:, order], moved.T @ moved, fit_grid(weight[:, order], spec), 8, 0.01, True)
    torch.testing.assert_close(permuted.weight, plain[:, order], rtol=1e-8, atol=1e-8)


def test_columns_are_ordered_by_falling_energy_with_free_columns_last() -> None:
    gram = torch.diag(torch.tensor([1.0, 5.0, 0.0, 5.0, 2.0, 99.0]))
    assert column_order(gram, 5, act_order=True).tolist() == [1, 3, 4, 0, 2, 5]
    assert column_order(gram, 5, act_order=False).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 2 / 37, 1e6])
def test_the_scale_of_the_gram_does_not_matter(scale: float) -> None:
    weight, x = drawn(4, 6), inputs(60, 6)
    grid = fit_grid(weight, QuantSpec.parse("int3:asym"))
    found = round_by_columns(weight, scale * (x.T @ x), grid, 6, 0.01, act_order=True).weight
    torch.testing.assert_close(
        found, round_by_columns(weight, x.T @ x, grid, 6, 0.01, True).weight, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns_are_rounded_to_nearest_and_change_nothing_else(act_order: bool) -> None:
    weight, x = drawn(4, 8), inputs(60, 8)
    x[:, [2, 5]] = 0
    gram, grid, live = x.T @ x, fit_grid(weight, QuantSpec.parse("int3:asym")), [0, 1, 3, 4, 6, 7]
    found = round_by_columns(weight, gram, grid, 8, 0.01, act_order).weight
    torch.testing.assert_close(found[:, [2, 5]], grid.round(weight)[:, [2, 5]], rtol=0, atol=1e-12)
    other = weight.clone()
    other[:, [2, 5]] = 7.0
    torch.testing.assert_close(
        round_by_columns(other, gram, grid, 8, 0.01, act_order).weight[:, live], found[:, live], rtol=0, atol=1e-12
    )
    assert bool(torch.isfinite(found).all())


def test_a_layer_that_never_had_an_input_is_rounded_to_nearest() -> None:
    for dtype in (torch.float32, torch.float64):
        weight = drawn(3, 5).to(dtype)
        grid = fit_grid(weight, QuantSpec.parse("int4"))
        found = round_by_columns(weight, torch.zeros(5, 5, dtype=dtype), grid, 5, 0.01, act_order=True).weight
        torch.testing.assert_close(found, grid.round(weight), rtol=0, atol=1e-6)


def test_a_free_bias_column_absorbs_the_mean_error() -> None:
    weight, x = drawn(6, 9), inputs(400, 8, ones=True) + torch.tensor([3.0] * 8 + [0.0])
    gram, grid = x.T @ x, fit_grid(weight[:, :8], QuantSpec.parse("int3:asym"))
    found = round_by_columns(weight, gram, grid, 8, 1e-6, act_order=True).weight
    change = found - weight
    assert bool((change[:, 8] != 0).all())
    residual = x @ change.T
    assert float(residual.mean(dim=0).abs().max()) < 1e-3 * float(residual.abs().max())
    frozen = round_by_columns(weight[:, :8], gram[:8, :8], grid, 8, 1e-6, act_order=True).weight
    assert float(residual.square().sum()) < float((x[:, :8] @ (frozen - weight[:, :8]).T).square().sum())


def test_inputs_are_left_as_they_were_and_a_hopeless_gram_is_an_error() -> None:
    weight, x = drawn(1, 4), inputs(9, 4)
    gram, grid = x.T @ x, fit_grid(weight, QuantSpec.parse("int3"))
    kept = weight.clone(), gram.clone()
    round_by_columns(weight, gram, grid, 4, 0.01, act_order=False)
    assert torch.equal(weight, kept[0]) and torch.equal(gram, kept[1])
    with pytest.raises(NumericalError, match="use more calibration data or a larger damping"):
        round_by_columns(weight, gram - 100 * torch.ones_like(gram), grid, 4, 1e-4, act_order=False)
