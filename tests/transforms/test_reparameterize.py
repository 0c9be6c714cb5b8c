"""Reparameterization keeps the function of norm and linear layer, and gives every channel the same range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dither.formats.activation import fake_quantize, fit_activation
from dither.formats.spec import QuantSpec
from dither.transforms.reparameterize import Reparameterization, fold_into_linear, fold_into_norm, reparameterization


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), weight, bias)


def fitted(z: Tensor, shift: str, round_zero_point: bool = True) -> Reparameterization:
    scales = fit_activation(z, QuantSpec.parse(f"int4:channel:{shift}"))
    return reparameterization(*scales, shift != "asym", round_zero_point)


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(2, 12), o=st.integers(1, 5), norm_bias=st.booleans(), linear_bias=st.booleans(),
    shift=st.sampled_from(["asym", "sym"]), rounds=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_function_of_norm_and_linear_layer_stays(
    d: int, o: int, norm_bias: bool, linear_bias: bool, shift: str, rounds: bool, seed: int
) -> None:
    x, gamma, W = drawn(30, d, seed=seed), drawn(d, seed=seed + 1) * 3, drawn(o, d, seed=seed + 2)
    beta = drawn(d, seed=seed + 3) if norm_bias else None
    b = drawn(o, seed=seed + 4) if linear_bias else None
    z = norm_output(x, gamma, beta)
    change = fitted(z, shift, rounds)
    new_gamma, new_beta = fold_into_norm(gamma, beta, change)
    new_weight, new_bias = fold_into_linear(W, b, change)
    found = functional.linear(norm_output(x, new_gamma, new_beta), new_weight, new_bias)
    torch.testing.assert_close(found, functional.linear(z, W, b), rtol=0, atol=1e-10)


def test_afterwards_one_scale_serves_every_channel_as_its_own_did() -> None:
    x, gamma, beta = drawn(200, 8), drawn(8, seed=1) * 5, drawn(8, seed=2)
    z, spec = norm_output(x, gamma, beta), QuantSpec.parse("int4:channel:asym")
    scale, zero_point = fit_activation(z, spec)
    change = reparameterization(scale, zero_point, False, False)
    moved = norm_output(x, *fold_into_norm(gamma, beta, change))
    # every channel's lowest and highest level are those of the shared grid
    low = -zero_point * scale / change.ratio - change.shift
    high = (15 - zero_point) * scale / change.ratio - change.shift
    torch.testing.assert_close(low, (-change.zero_point * change.scale).expand(8), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(high - low, (15 * change.scale).expand(8), rtol=1e-10, atol=1e-10)
    # and the values reached by the shared grid are those of the channels' own
    per_channel = fake_quantize(z, (scale, zero_point), spec)
    codes = (per_channel / scale + zero_point).round()
    shared = (codes - change.zero_point) * change.scale
    torch.testing.assert_close((shared + change.shift) * change.ratio, per_channel, rtol=1e-9, atol=1e-9)
    assert float((moved.amax(0) - moved.amin(0)).max()) <= 16 * float(change.scale)


def test_the_numbers_are_the_published_formulas() -> None:
    s, z = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64), torch.tensor([3.0, 8.0, 10.0], dtype=torch.float64)
    change = reparameterization(s, z, symmetric=False, round_zero_point=False)
    mean_scale, mean_zero = 0.4, 7.0
    torch.testing.assert_close(change.ratio, s / mean_scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(change.shift, -z * s / change.ratio + mean_zero * mean_scale, rtol=1e-12, atol=1e-12)
    assert (float(change.scale), float(change.zero_point)) == (pytest.approx(mean_scale), pytest.approx(mean_zero))
    gamma, beta = drawn(3), drawn(3, seed=1)
    new_gamma, new_beta = fold_into_norm(gamma, beta, change)
    assert new_beta is not None
    torch.testing.assert_close(new_gamma, gamma / change.ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(new_beta, beta / change.ratio - change.shift, rtol=1e-12, atol=1e-12)
    W, b = drawn(2, 3, seed=2), drawn(2, seed=3)
    weight, bias = fold_into_linear(W, b, change)
    assert bias is not None
    torch.testing.assert_close(weight, W * change.ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(bias, b + (W * change.ratio) @ change.shift, rtol=1e-12, atol=1e-12)


def test_the_mean_zero_point_is_whole_only_where_that_is_asked_for() -> None:
    scales = torch.tensor([0.1, 0.4], dtype=torch.float64), torch.tensor([3.0, 8.0], dtype=torch.float64)
    assert float(reparameterization(*scales, False, True).zero_point) == 6
    assert float(reparameterization(*scales, False, False).zero_point) == 5.5


def test_a_symmetric_format_needs_no_bias_and_creates_none() -> None:
    z = drawn(50, 4) * torch.arange(1, 5)
    change = fitted(z, "sym")
    assert not bool(change.shift.any()) and float(change.zero_point) == 8
    assert fold_into_norm(drawn(4), None, change)[1] is None
    assert fold_into_linear(drawn(2, 4), None, change)[1] is None


def test_a_channel_without_values_stays_harmless() -> None:
    z = drawn(50, 4) * 1e-3
    z[:, 1] = 0
    change = fitted(z, "asym")
    assert float(change.ratio[1]) == pytest.approx(1, abs=1e-9)
    assert float(change.scale) == pytest.approx(float(fitted(z[:, [0, 2, 3]], "asym").scale))


def test_arguments_are_left_as_they_were() -> None:
    W, b, gamma, beta = drawn(2, 3), drawn(2), drawn(3), drawn(3)
    kept = [part.clone() for part in (W, b, gamma, beta)]
    change = fitted(drawn(20, 3), "asym")
    fold_into_linear(W, b, change)
    fold_into_norm(gamma, beta, change)
    assert all(torch.equal(*pair) for pair in zip((W, b, gamma, beta), kept, strict=True))
