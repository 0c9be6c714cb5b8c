"""Absorbing activation error: the closed form against a stacked least-squares problem."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import NumericalError
from dither.solvers.ridge import absorb_activation_error, ridge
from dither.statistics.gram import Gram


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def appended(x: Tensor, ones: bool) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1) if ones else x


def objective(true: Tensor, seen: Tensor, weight: Tensor, change: Tensor, lam: float) -> Tensor:
    return (true @ weight.T - seen @ (weight + change).T).square().sum() + lam * change.square().sum()


@settings(max_examples=40, deadline=None)
@given(
    o=st.integers(1, 5), i=st.integers(1, 8), n=st.integers(1, 30), lam=st.sampled_from([0.01, 1.0, 50.0]),
    ones=st.booleans(), dead=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_aqer_is_the_ridge_minimum_of_the_stacked_system_with_the_bias_as_a_column(
    o: int, i: int, n: int, lam: float, ones: bool, dead: bool, seed: int
) -> None:
    x, weight = drawn(n, i, seed=seed), drawn(o, i + ones, seed=seed + 1)
    if dead:
        x[:, 0] = 0
    seen = torch.round(x * 2) / 2
    A, Q = appended(x, ones), appended(seen, ones)
    found = absorb_activation_error(weight, Gram.of(seen, x, ones), lam)
    # min ||[Q; sqrt(lam) I] D - [(A - Q) W'; 0]||^2
    k = i + ones
    left = torch.cat([Q, lam**0.5 * torch.eye(k, dtype=torch.float64)])
    right = torch.cat([(A - Q) @ weight.T, torch.zeros(k, o, dtype=torch.float64)])
    change = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found, weight + change, rtol=1e-7, atol=1e-8)
    zero = torch.zeros_like(weight)
    assert objective(A, Q, weight, found - weight, lam) <= objective(A, Q, weight, zero, lam) * (1 + 1e-12)


@pytest.mark.parametrize("ones", [True, False])
def test_the_gradient_vanishes_at_the_result(ones: bool) -> None:
    x, weight = drawn(40, 6), drawn(3, 6 + ones, seed=1)
    seen = torch.round(x)
    change = (absorb_activation_error(weight, Gram.of(seen, x, ones), 2.0) - weight).requires_grad_()
    objective(appended(x, ones), appended(seen, ones), weight, change, 2.0).backward()  # type: ignore[no-untyped-call]
    assert change.grad is not None
    torch.testing.assert_close(change.grad, torch.zeros_like(weight), rtol=0, atol=1e-9)


def test_inputs_that_are_not_quantized_leave_the_weight_alone() -> None:
    x, weight = drawn(40, 6), drawn(3, 6, seed=1)
    assert torch.equal(absorb_activation_error(weight, Gram.of(x), 1.0), weight)
    found = absorb_activation_error(weight, Gram.of(x, x.clone()), 1.0)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-12)


def test_the_papers_form_with_expectations_gives_the_same_change() -> None:
    x, weight, n = drawn(200, 5), drawn(3, 5, seed=1), 200
    seen, lam = torch.round(x), 4.0
    dx = seen - x
    expectation, eye = dx.T @ seen / n, torch.eye(5, dtype=torch.float64)
    paper = -weight @ expectation @ torch.linalg.inv(seen.T @ seen / n + lam / n * eye)
    torch.testing.assert_close(
        absorb_activation_error(weight, Gram.of(seen, x), lam), weight + paper, rtol=1e-9, atol=1e-10
    )


def test_a_large_ridge_changes_nothing_and_a_small_one_lowers_the_output_error() -> None:
    x, weight = drawn(300, 6), drawn(3, 6, seed=1)
    gram = Gram.of(torch.round(x), x)
    torch.testing.assert_close(absorb_activation_error(weight, gram, 1e12), weight, rtol=1e-6, atol=1e-6)
    errors = [gram.output_error(weight, absorb_activation_error(weight, gram, lam)) for lam in (1e-6, 10.0, 100.0, 1e9)]
    assert errors == sorted(errors) and errors[0] < 0.95 * errors[-1]


def test_a_ridge_solves_its_system_and_says_when_it_is_singular() -> None:
    x, right = drawn(10, 4), drawn(4, 2, seed=1)
    gram = x.T @ x
    system = gram + 0.3 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(system @ ridge(gram, right, 0.3), right, rtol=1e-10, atol=1e-10)
    with pytest.raises(NumericalError, match="ridge over 4 columns is singular at lam 0; use a larger lam_mean"):
        ridge(torch.zeros(4, 4, dtype=torch.float64), right, 0.0)
