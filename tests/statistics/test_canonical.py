"""Canonical correlations: as defined, blind to coordinates, and not fooled by few samples."""

import pytest
import scipy.linalg
import torch
from torch import Tensor

from dither.errors import InputError
from dither.statistics.canonical import canonical_correlations, whitened


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlation(x: Tensor, y: Tensor, ridge: float = 1e-9) -> float:
    return float(canonical_correlations(whitened(x, ridge), whitened(y, ridge))[0])


def test_it_is_the_largest_of_the_generalized_eigenproblem() -> None:
    x, noise = drawn(200, 4), drawn(200, 3, seed=1)
    y = x[:, :3] @ drawn(3, 3, seed=2) + noise
    u, v = x - x.mean(dim=0), y - y.mean(dim=0)
    a, b, c = u.T @ u, v.T @ v, u.T @ v
    left = (c @ torch.linalg.solve(b, c.T)).numpy()
    assert correlation(x, y) == pytest.approx(float(scipy.linalg.eigh(left, a.numpy())[0][-1]) ** 0.5, abs=1e-6)


def test_coordinates_do_not_matter_and_a_set_correlates_with_itself() -> None:
    x, y = drawn(100, 5), drawn(100, 4, seed=1)
    turned = x @ drawn(5, 5, seed=2) + 3
    assert correlation(x, turned) == pytest.approx(1, abs=1e-6)
    assert correlation(turned, y) == pytest.approx(correlation(x, y), abs=1e-6)


def test_independent_sets_of_fewer_samples_than_dimensions_do_not_correlate_perfectly() -> None:
    x, y = drawn(20, 60), drawn(20, 60, seed=1)
    assert correlation(x, y) > 0.999
    assert correlation(x, y, ridge=10.0) < 0.8
    assert correlation(drawn(4000, 3), drawn(4000, 3, seed=1)) < 0.1


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="at least two samples"):
        whitened(drawn(1, 3))
