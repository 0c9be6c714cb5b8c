"""Hutchinson's estimate, its standard error, and when it is enough."""

import math

import pytest
import torch

from dither.errors import InputError
from dither.statistics.divergence import kl_rows, mean_and_error
from dither.statistics.hutchinson import LEAST, Trace, positive, rademacher, settled


def test_the_mean_of_draws_is_the_trace_within_its_standard_error() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(8, 8, generator=generator)
    matrix = half @ half.T - 3 * torch.eye(8)
    draws = []
    for _ in range(500):
        z = rademacher((8,), generator)
        draws.append(float(z @ matrix @ z))
    trace = Trace(tuple(draws))
    assert abs(trace.mean - float(matrix.trace())) < 3 * trace.error
    assert trace.error == pytest.approx(float(torch.tensor(draws).std()) / math.sqrt(500), rel=1e-4)


def test_a_diagonal_matrix_needs_one_draw() -> None:
    z = rademacher((5,), torch.Generator().manual_seed(1))
    assert set(z.abs().tolist()) == {1.0}
    assert float(z @ torch.diag(torch.arange(5.0)) @ z) == 10


def test_few_draws_are_never_enough_however_close_they_are() -> None:
    same = {"a": Trace((2.0,) * (LEAST - 1))}
    assert not settled(same, 0.05, 1.0)
    assert settled({"a": same["a"].merge(Trace((2.0,)))}, 0.05, 1.0)


def test_the_share_of_layers_that_must_be_sure() -> None:
    sure, unsure = Trace((2.0, 2.01) * LEAST), Trace((-1.0, 1.1) * LEAST)
    assert settled({"a": sure, "b": sure, "c": unsure}, 0.05, 0.6)
    assert not settled({"a": sure, "b": unsure, "c": unsure}, 0.05, 0.6)


def test_negative_traces_become_small_not_rewards() -> None:
    assert positive([4.0, -5.0, 2.0, 1e-9]) == [4.0, 0.02, 2.0, 0.02]
    with pytest.raises(InputError, match="no Hessian trace is positive"):
        positive([-1.0, 0.0])


def test_divergence_of_rows() -> None:
    one = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    two = one + torch.tensor([1.0, 0.0, 0.0, 0.0])
    p, q = one.softmax(1), two.softmax(1)
    torch.testing.assert_close(kl_rows(one, two), (p * (p / q).log()).sum(1), rtol=1e-4, atol=1e-7)
    assert kl_rows(one, one + 3).abs().max() < 1e-6
    assert mean_and_error(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(1.0))
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])
