"""Rounding refinement: exact best single moves, monotone, bounded, and at rest in a local optimum."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.solvers.refine import refine_codes


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Problem:
    """Targets in units of each entry's scale, to be met by codes of two bits or so."""

    def __init__(self, o: int, n: int, seed: int, span: int = 3, correlated: float = 1.0) -> None:
        x = drawn(4 * n, n, seed=seed) + correlated * drawn(4 * n, 1, seed=seed + 1)
        self.proxy, self.scale = x.T @ x, drawn(o, n, seed=seed + 2).abs() + 0.2
        self.target = (
            self.scale * span * torch.rand(o, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )
        self.bounds = torch.zeros_like(self.scale), torch.full_like(self.scale, float(span))
        self.codes = torch.round(self.target / self.scale)

    def loss(self, codes: Tensor) -> Tensor:
        error = codes * self.scale - self.target
        return ((error @ self.proxy) * error).sum(dim=1)

    def refined(self, steps: int, codes: Tensor | None = None) -> Tensor:
        start = self.codes if codes is None else codes
        error = start * self.scale - self.target
        return refine_codes(start, self.bounds, self.scale, error, self.proxy, steps)

    def best_move(self, codes: Tensor) -> Tensor:
        """Row by row, the codes after the best of all single moves, or the same where none helps."""
        tries = [codes]
        for column, step in itertools.product(range(codes.shape[1]), (-1, 1)):
            moved = codes.clone()
            moved[:, column] = torch.minimum(torch.maximum(moved[:, column] + step, self.bounds[0][:, column]),
                                             self.bounds[1][:, column])  # fmt: skip
            tries.append(moved)
        best = torch.stack([self.loss(one) for one in tries]).argmin(dim=0)
        return torch.stack(tries)[best, torch.arange(len(codes))]


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 6), n=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_every_step_is_the_best_single_move_of_every_row(o: int, n: int, seed: int) -> None:
    problem = Problem(o, n, seed)
    codes = problem.codes
    for steps in range(1, 12):
        codes = problem.best_move(codes)
        torch.testing.assert_close(problem.loss(problem.refined(steps)), problem.loss(codes), rtol=1e-9, atol=1e-9)
        assert torch.equal(problem.refined(steps), codes)


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 6), n=st.integers(1, 20), seed=st.integers(0, 10**6), steps=st.integers(0, 60))
def test_no_row_gets_worse_and_codes_stay_whole_and_within_bounds(o: int, n: int, seed: int, steps: int) -> None:
    problem = Problem(o, n, seed)
    before, after = problem.refined(steps), problem.refined(steps + 1)
    assert bool((problem.loss(after) <= problem.loss(before) * (1 + 1e-12)).all())
    assert bool((after >= problem.bounds[0]).all() and (after <= problem.bounds[1]).all())
    assert torch.equal(after, after.round())
    assert bool(((after - before).abs().sum(dim=1) <= 1).all())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_with_few_columns_the_end_is_a_local_optimum_and_mostly_the_best_of_all_codes(n: int) -> None:
    problem = Problem(200, n, seed=5)
    found = problem.refined(100)
    assert torch.equal(problem.best_move(found), found)
    every = torch.tensor(list(itertools.product(range(4), repeat=n)), dtype=torch.float64)
    errors = every[None] * problem.scale[:, None] - problem.target[:, None]
    best = ((errors @ problem.proxy) * errors).sum(dim=2).amin(dim=1)
    optimal = problem.loss(found) <= best * (1 + 1e-9) + 1e-12
    assert float(optimal.double().mean()) >= (1.0 if n == 1 else 0.55)
    # single moves reach the optimum wherever inputs do not correlate
    plain = Problem(200, n, seed=5)
    plain.proxy = torch.diag(plain.proxy.diagonal())
    errors = every[None] * plain.scale[:, None] - plain.target[:, None]
    best = ((errors @ plain.proxy) * errors).sum(dim=2).amin(dim=1)
    torch.testing.assert_close(
        plain.loss(plain.refined(100, torch.zeros_like(plain.codes))), best, rtol=1e-9, atol=1e-9
    )


def test_a_local_optimum_stays_and_rows_are_independent() -> None:
    problem = Problem(12, 10, seed=1)
    found = problem.refined(500)
    assert torch.equal(problem.refined(500, found), found)
    for row in range(12):
        error = (problem.codes * problem.scale - problem.target)[row : row + 1]
        bounds = problem.bounds[0][row : row + 1], problem.bounds[1][row : row + 1]
        alone = refine_codes(
            problem.codes[row : row + 1], bounds, problem.scale[row : row + 1], error, problem.proxy, 500
        )
        assert torch.equal(alone[0], found[row])


def test_equal_columns_come_to_rest() -> None:
    proxy, scale = torch.ones(2, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    codes, target = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64)
    bounds = torch.zeros_like(codes), torch.ones_like(codes)
    found = refine_codes(codes, bounds, scale, codes - target, proxy, 7)
    assert float(found.sum()) == 1
    assert torch.equal(refine_codes(codes, bounds, scale, codes - target, proxy, 1000), found)


def test_columns_without_input_and_bounds_without_room_do_not_move() -> None:
    problem = Problem(5, 6, seed=2)
    problem.proxy[3] = problem.proxy[:, 3] = 0
    assert torch.equal(problem.refined(100)[:, 3], problem.codes[:, 3])
    problem.bounds = problem.codes, problem.codes
    assert torch.equal(problem.refined(100), problem.codes)


def test_codes_and_error_are_left_as_they_were() -> None:
    problem = Problem(5, 6, seed=3)
    codes, error = problem.codes.clone(), problem.codes * problem.scale - problem.target
    kept = error.clone()
    refine_codes(codes, problem.bounds, problem.scale, error, problem.proxy, 50)
    assert torch.equal(codes, problem.codes) and torch.equal(error, kept)
    assert torch.equal(refine_codes(codes, problem.bounds, problem.scale, error, problem.proxy, 0), codes)
