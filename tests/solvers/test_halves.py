"""Rounding by halves, and refinement over a whole matrix with a free bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.spec import QuantSpec
from dither.solvers.halves import refine_all, round_and_refine, round_by_halves

TEXTS = ["int3:asym", "int4", "int2:g2:asym", "int3:dual:asym", "int3:narrow", "int4:g2:ic"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, columns: int, ones: bool, seed: int = 0) -> Tensor:
    x = drawn(rows, columns, seed=seed) + drawn(rows, 1, seed=seed + 1) + 0.5
    return torch.cat([x, torch.ones(rows, 1, dtype=x.dtype)], dim=1) if ones else x


def distance(weight: Tensor, target: Tensor, gram: Tensor, lam: float = 0.0) -> Tensor:
    change = weight - target
    return ((change @ (gram + lam * torch.eye(len(gram), dtype=gram.dtype))) * change).sum(dim=1)


def published(weight: Tensor, gram: Tensor, grid: Grid, columns: int, lam: float, steps: int) -> Tensor:
    """The loop as the paper's pseudo-code has it, with an explicit inverse."""
    weight, k, lo = weight.clone(), weight.shape[1], 0
    while lo < columns:
        h = max(1, (k - lo) // 2)
        s, r = list(range(lo, min(lo + h, columns))), list(range(min(lo + h, columns), k))
        index = torch.tensor(s)
        if steps:
            fixed = round_and_refine(weight[:, s], gram[s][:, s], grid, slice(s[0], s[-1] + 1), steps)
        else:
            fixed = grid.round(weight[:, s], index)
        D = fixed - weight[:, s]
        if r:
            inverse = torch.linalg.inv(gram[r][:, r] + lam * torch.eye(len(r), dtype=gram.dtype))
            weight[:, r] += -(inverse @ gram[r][:, s] @ D.T).T
        weight[:, s] = fixed
        lo += len(s)
    return weight


@settings(max_examples=40, deadline=None)
@given(
    o=st.sampled_from([2, 6, 40]), pairs=st.integers(1, 8), ones=st.booleans(), text=st.sampled_from(TEXTS),
    steps=st.sampled_from([0, 100]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_loop_is_the_papers_and_puts_every_weight_on_the_grid(
    o: int, pairs: int, ones: bool, text: str, steps: int, seed: int
) -> None:
    i = 2 * pairs
    x, weight = inputs(60, i, ones, seed), drawn(o, i + ones, seed=seed + 2)
    grid = fit_grid(weight[:, :i], QuantSpec.parse(text))
    found = round_by_halves(weight, x.T @ x, grid, i, 2.0, steps)
    torch.testing.assert_close(found, published(weight, x.T @ x, grid, i, 2.0, steps), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grid.round(found[:, :i]), found[:, :i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
@pytest.mark.parametrize("ones", [True, False])
def test_odd_widths_round_every_column_and_leave_the_bias_free(columns: int, ones: bool) -> None:
    x, weight = inputs(60, columns, ones), drawn(4, columns + ones, seed=2)
    grid = fit_grid(weight[:, :columns], QuantSpec.parse("int2:asym"))
    found = round_by_halves(weight, x.T @ x, grid, columns, 1.0, 100)
    torch.testing.assert_close(grid.round(found[:, :columns]), found[:, :columns], rtol=0, atol=1e-12)
    assert not ones or bool((found[:, columns] != weight[:, columns]).all())


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("text", ["int3:asym", "int4:asym", "int3"])
def test_halves_beat_nearest_and_refinement_beats_halves_on_average(text: str, ones: bool) -> None:
    totals = torch.zeros(3, dtype=torch.float64)
    for seed in range(0, 40, 4):
        x, weight = inputs(200, 24, ones, seed), drawn(16, 24 + ones, seed=seed + 2)
        gram, grid = x.T @ x, fit_grid(weight[:, :24], QuantSpec.parse(text))
        nearest = torch.cat([grid.round(weight[:, :24]), weight[:, 24:]], dim=1)
        halves = (round_by_halves(weight, gram, grid, 24, 1.0, steps) for steps in (0, 100))
        totals += torch.stack([distance(found, weight, gram, 1.0).sum() for found in (nearest, *halves)])
    assert float(totals[1]) < 0.6 * float(totals[0])  # measured: 0.48 to 0.54
    assert float(totals[2]) < 0.99 * float(totals[1])  # measured: 0.93 to 0.98


def test_a_diagonal_gram_gives_rounding_to_nearest() -> None:
    weight, gram = drawn(4, 7), torch.diag(torch.arange(1.0, 8.0).double())
    grid = fit_grid(weight[:, :6], QuantSpec.parse("int3:asym"))
    found = round_by_halves(weight, gram, grid, 6, 0.5, 100)
    torch.testing.assert_close(found[:, :6], grid.round(weight[:, :6]), rtol=0, atol=1e-12)
    assert torch.equal(found[:, 6], weight[:, 6])


def test_refined_rounding_keeps_to_the_two_neighbours_and_helps() -> None:
    x, weight = inputs(100, 10, ones=False), drawn(6, 20, seed=2)
    grid, columns = fit_grid(weight, QuantSpec.parse("int3:asym")), slice(4, 14)
    target, proxy = weight[:, columns] * 1.1, x.T @ x
    found, near = (round_and_refine(target, proxy, grid, columns, steps) for steps in (100, 0))
    assert torch.equal(near, grid.round(target, columns))
    assert bool((distance(found, target, proxy) <= distance(near, target, proxy) + 1e-9).all())
    assert float(distance(found, target, proxy).sum()) < 0.9 * float(distance(near, target, proxy).sum())
    low, high = (grid.round(target, columns, mode) for mode in ("floor", "ceil"))  # type: ignore[arg-type]
    assert bool(((found == low) | (found == high)).all())


@settings(max_examples=30, deadline=None)
@given(
    o=st.sampled_from([2, 6]), pairs=st.integers(1, 8), ones=st.booleans(), text=st.sampled_from(TEXTS),
    lam=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_refining_everything_is_never_worse_and_ends_with_the_best_bias(
    o: int, pairs: int, ones: bool, text: str, lam: float, seed: int
) -> None:
    i = 2 * pairs
    x, target = inputs(60, i, ones, seed), drawn(o, i + ones, seed=seed + 2)
    gram, grid = x.T @ x, fit_grid(target[:, :i], QuantSpec.parse(text))
    weight = torch.cat([grid.round(target[:, :i]), target[:, i:]], dim=1)
    found = refine_all(weight, target, gram, grid, i, lam, 100)
    slack = 1e-9 * (1 + distance(weight, target, gram, lam))
    assert bool((distance(found, target, gram, lam) <= distance(weight, target, gram, lam) + slack).all())
    torch.testing.assert_close(grid.round(found[:, :i]), found[:, :i], rtol=0, atol=1e-12)
    if ones:  # the derivative by the bias is zero
        slope = (found - target) @ (gram + lam * torch.eye(i + 1, dtype=gram.dtype))[:, i]
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-8)


def test_after_enough_refinement_no_single_move_helps_even_with_the_bias_refitted() -> None:
    x, target, spec = inputs(60, 6, ones=True), drawn(30, 7, seed=2), QuantSpec.parse("int3:asym")
    x[:, :6] += 2  # a mean that the bias can absorb
    gram, grid, lam = x.T @ x, fit_grid(target[:, :6], spec), 0.7
    H = gram + lam * torch.eye(7, dtype=gram.dtype)
    found = refine_all(torch.cat([grid.round(target[:, :6]), target[:, 6:]], dim=1), target, gram, grid, 6, lam, 1000)
    codes, best = grid.encode(found[:, :6]), distance(found, target, gram, lam)
    for column in range(6):
        for step in (-1, 1):
            moved = codes.clone()
            moved[:, column] = (moved[:, column] + step).clamp(0, 7)
            change = grid.decode(moved) - target[:, :6]
            bias = target[:, 6] - change @ H[:6, 6] / H[6, 6]
            other = distance(torch.cat([grid.decode(moved), bias[:, None]], dim=1), target, gram, lam)
            assert bool((other >= best * (1 - 1e-9)).all())


def test_refining_everything_helps_nearest_rounding_much() -> None:
    x, target = inputs(300, 24, ones=True), drawn(16, 25, seed=2)
    gram, grid = x.T @ x, fit_grid(target[:, :24], QuantSpec.parse("int3:asym"))
    nearest = torch.cat([grid.round(target[:, :24]), target[:, 24:]], dim=1)
    found = refine_all(nearest, target, gram, grid, 24, 0.0, 100)
    assert float(distance(found, target, gram).sum()) < 0.4 * float(distance(nearest, target, gram).sum())


def test_weights_and_grams_are_left_as_they_were() -> None:
    x, weight = inputs(60, 6, ones=True), drawn(3, 7, seed=2)
    gram, grid = x.T @ x, fit_grid(weight[:, :6], QuantSpec.parse("int3"))
    kept = weight.clone(), gram.clone()
    round_by_halves(weight, gram, grid, 6, 1.0, 10)
    refine_all(weight, weight, gram, grid, 6, 1.0, 10)
    assert torch.equal(weight, kept[0]) and torch.equal(gram, kept[1])
