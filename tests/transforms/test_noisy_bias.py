"""NoisyQuant's theorem: the closed form equals Monte Carlo and the paper's pieces, and its sign is the paper's."""

import pytest
import torch
from torch import Tensor

from dither.transforms.noisy_bias import best_reach, error_change, noise_direction

HALF = 0.7


def rounded(x: Tensor) -> Tensor:
    """The centre of each value's bin; bins are 2 * HALF wide, one is centred at 0."""
    return torch.round(x / (2 * HALF)) * (2 * HALF)


def paper(x: Tensor, n: Tensor) -> Tensor:
    """The theorem's pieces for n up to 3b - x, x between 0 and b."""
    change = n.square() / 3 - torch.where(n >= HALF - x, HALF / n * (x + n - HALF).square(), 0.0)
    return change - torch.where(n > HALF + x, HALF / n * (n - x - HALF).square(), 0.0)


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = HALF * torch.rand(500, generator=generator, dtype=torch.float64)
    n = 0.01 + (3 * HALF - x - 0.01) * torch.rand(500, generator=generator, dtype=torch.float64)
    return x, n


def test_the_closed_form_equals_monte_carlo() -> None:
    generator = torch.Generator().manual_seed(1)
    for x, reach in ((0.1, 0.3), (0.6, 0.5), (0.65, 1.2), (0.3, 3.1), (0.0, 1.4)):
        noise = reach * (2 * torch.rand(400_000, generator=generator, dtype=torch.float64) - 1)
        found = (rounded(x + noise) - x - noise).square().mean() - (rounded(torch.tensor(x)) - x) ** 2
        expected = error_change(torch.tensor([x], dtype=torch.float64), reach, HALF)
        torch.testing.assert_close(found, expected[0], rtol=0, atol=2e-3)


def test_the_closed_form_equals_the_papers_pieces() -> None:
    x, n = points()
    torch.testing.assert_close(error_change(x, n, HALF), paper(x, n), rtol=1e-9, atol=1e-12)


def test_noise_helps_exactly_where_the_theorem_says() -> None:
    x, n = points()
    stated = (n >= HALF - x) & (n <= torch.minimum(HALF + x, 3 * HALF - x))
    helps = error_change(x, n, HALF) < 0
    assert bool(stated.any()) and 0 < int(helps[stated].sum()) < int(stated.sum())
    assert torch.equal(helps[stated], (x > HALF - n + (n**3 / (3 * HALF)).sqrt())[stated])
    assert not bool(helps[n < HALF - x].any())  # no value leaves its bin: noise can only harm


def test_the_best_reach_is_zero_at_centres_and_large_at_edges() -> None:
    reaches = torch.linspace(0.02, 1.4, 60)
    half = torch.full((100,), HALF)
    assert best_reach(torch.zeros(100), half, reaches) == (0.0, 0.0)
    reach, change = best_reach(torch.full((100,), 0.99 * HALF), half, reaches)
    assert change == pytest.approx(float(error_change(torch.tensor([0.99 * HALF]), reach, HALF)[0]))
    assert change < -0.5 * HALF**2
    assert all(change <= float(error_change(torch.tensor([0.99 * HALF]), float(r), HALF)[0]) + 1e-6 for r in reaches)


def test_the_direction_is_uniform_or_the_released_codes_normal() -> None:
    uniform = noise_direction(20_000, "uniform", torch.Generator().manual_seed(0))
    assert float(uniform.abs().max()) <= 1
    assert float(uniform.mean()) == pytest.approx(0, abs=0.02)
    assert float(uniform.var()) == pytest.approx(1 / 3, abs=0.01)
    legacy = noise_direction(20_000, "gaussian-legacy", torch.Generator().manual_seed(0))
    assert float(legacy.mean()) == pytest.approx(-1, abs=0.05)
    assert float(legacy.std()) == pytest.approx(2, abs=0.05)
