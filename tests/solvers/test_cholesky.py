"""Factors of Gram matrices: solves, the damping ladder and what it records, the inverse's upper factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import NonFiniteError, NumericalError
from dither.solvers.cholesky import LADDER, damped, factorize, inverse_of_upper


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(columns: int, rows: int, seed: int = 0) -> Tensor:
    x = drawn(rows, columns, seed=seed)
    return x.T @ x


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 12), damping=st.sampled_from([1e-3, 0.01, 0.3]), seed=st.integers(0, 10**6))
def test_a_factor_solves_the_system_damped_by_its_mean_diagonal(columns: int, damping: float, seed: int) -> None:
    matrix, right = gram_of(columns, 20, seed), drawn(columns, 3, seed=seed + 1)
    factor = factorize(matrix, damping)
    system = matrix + damping * matrix.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(system @ factor.solve(right), right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factor.lower @ factor.lower.T, system, rtol=1e-10, atol=1e-10)
    assert (factor.damping, factor.tries) == (damping, 1)


def test_a_matrix_that_fails_climbs_the_ladder_and_the_factor_says_how_far() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    unit = float(matrix.diagonal().mean())
    factor = factorize(matrix, 0.01)
    assert (factor.tries, factor.damping) == (2, pytest.approx(0.1))
    torch.testing.assert_close(factor.lower @ factor.lower.T, damped(matrix, 0.1 * unit), rtol=1e-12, atol=1e-12)
    assert factorize(matrix, 0.001).tries == 3
    with pytest.raises(NumericalError, match=r"of 4 columns failed up to damping 0\.01 of its mean diagonal"):
        factorize(matrix, 0.0001)
    assert LADDER == (1.0, 10.0, 100.0)


def test_a_singular_matrix_and_one_of_zeros_are_factored_once_damped() -> None:
    assert factorize(gram_of(6, 2), 0.01).tries == 1
    factor = factorize(torch.zeros(3, 3, dtype=torch.float64), 0.01)
    torch.testing.assert_close(factor.lower, 0.1 * torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    matrix = gram_of(3, 5)
    matrix[0, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="Gram matrix of 3 columns"):
        factorize(matrix, 0.01)


def test_damping_returns_a_new_matrix() -> None:
    matrix = gram_of(3, 5)
    before = matrix.clone()
    torch.testing.assert_close(damped(matrix, 2.5), before + 2.5 * torch.eye(3, dtype=torch.float64), rtol=0, atol=0)
    assert torch.equal(matrix, before)


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_the_upper_factor_of_the_inverse_is_upper_and_squares_to_the_inverse(columns: int, seed: int) -> None:
    matrix = damped(gram_of(columns, 20, seed), 0.5)
    upper = inverse_of_upper(torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1))
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-10)
    direct = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)  # as the released GPTQ computes it
    torch.testing.assert_close(upper, direct, rtol=1e-8, atol=1e-9)
