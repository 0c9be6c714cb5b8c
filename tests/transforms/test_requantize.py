"""Re-quantization as functions of tensors: exact powers, the least error, means that stay."""

import math

import pytest
import torch

from dither.transforms.requantize import (
    activation_scale,
    expected_error,
    folded_bias,
    power_above,
    rounded,
    weight_codes,
    weight_scale,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_powers_of_two_are_exact_and_the_next_above() -> None:
    scale = torch.tensor([0.25, 0.2500001, 0.1, 3.0, 4.0], dtype=torch.float64)
    assert power_above(scale).tolist() == [0.25, 0.5, 0.125, 4.0, 4.0]


@pytest.mark.parametrize("pow2", [False, True])
def test_the_corrected_scale_is_the_candidate_of_least_weighed_error(pow2: bool) -> None:
    weight, importance = drawn(6, 40), drawn(6, 40, seed=1).square()
    weight[:, 0] *= 6  # an outlier makes it worth to clip
    importance[:, 0] *= 0.01
    scale = weight_scale(weight, 4, pow2, importance)
    plain = weight_scale(weight, 4, pow2, None)

    def error(scales: torch.Tensor) -> torch.Tensor:
        return (importance * (rounded(weight, scales, 4) - weight).square()).sum(dim=1)

    assert bool((error(scale) <= error(plain)).all()) and bool((error(scale) < error(plain)).any())
    assert torch.allclose(plain / weight.abs().amax(dim=1) * 7, torch.ones(()).double()) != pow2
    if pow2:
        assert bool((torch.frexp(scale)[0] == 0.5).all())
    assert weight_codes(weight, scale, 4).abs().max() == 7


def test_the_folded_bias_removes_the_mean_error_and_nothing_else() -> None:
    weight, x = drawn(5, 12), drawn(400, 12, seed=1) + 2
    stored = rounded(weight, weight_scale(weight, 3, False, None), 3)
    seen = x + 0.1 * drawn(400, 12, seed=2).abs()
    bias = folded_bias(drawn(5, seed=3), weight, stored, x.mean(0)[None], seen.mean(0)[None])
    error = (seen @ stored.T + bias) - (x @ weight.T + drawn(5, seed=3))
    assert error.mean(0).abs().max() < 1e-12
    assert torch.allclose(folded_bias(bias, weight, weight, x.mean(0)[None], x.mean(0)[None]), bias)


@pytest.mark.parametrize(("scale", "steps"), [(0.02, 127), (0.01, 127), (0.5, 3)])
def test_the_expected_error_is_that_of_drawn_values(scale: float, steps: int) -> None:
    x = drawn(400_000) * 0.7
    found = ((x / scale).round().clamp(-steps, steps) * scale - x).square().mean()
    assert math.isclose(expected_error(scale, scale * steps, 0.7), float(found), rel_tol=0.05)


def test_a_power_of_two_below_clips_only_where_that_costs_less() -> None:
    fits = 127 * 2.0**-7
    assert activation_scale(-fits, fits, 8, True, False) == 2.0**-7
    assert activation_scale(-fits * 1.01, fits, 8, True, False) == 2.0**-7  # hardly anything is beyond it
    assert activation_scale(-fits * 1.9, fits, 8, True, False) == 2.0**-6
    assert activation_scale(0.0, 2.55, 8, False, True) == pytest.approx(0.01)
    assert activation_scale(0.0, 2.54, 8, False, False) == pytest.approx(0.02)
