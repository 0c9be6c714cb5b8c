"""Fake quantization of activations against plain formulas."""

import math

import pytest
import torch
from torch import Tensor

from dither.errors import SpecError
from dither.formats.activation import covered_range, fake_quantize, fit_activation, measure
from dither.formats.grid import decode, encode
from dither.formats.spec import QuantSpec


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squared_error(sample: Tensor, scales: tuple[Tensor, Tensor], spec: QuantSpec) -> float:
    return float((fake_quantize(sample, scales, spec) - sample).square().mean())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fitted_parameters_follow_the_scaffolds_formulas(bits: int, granularity: str) -> None:
    sample, levels = drawn(50, 6) + 1, 2**bits - 1
    scale, zero_point = fit_activation(sample, QuantSpec.parse(f"int{bits}:{granularity}:asym"))
    cells = sample.T if granularity == "channel" else sample.reshape(1, -1)
    low, high = cells.amin(1).clamp(max=0), cells.amax(1).clamp(min=0)
    delta = ((high - low) / levels).reshape(scale.shape)
    torch.testing.assert_close(scale, delta, rtol=1e-12, atol=0)
    assert torch.equal(zero_point, torch.round(-low.reshape(scale.shape) / delta))
    x = drawn(2, 7, 6, seed=1) * 3
    expected = ((torch.round(x / delta) + zero_point).clamp(0, levels) - zero_point) * delta
    spec = QuantSpec.parse(f"int{bits}:{granularity}:asym")
    torch.testing.assert_close(fake_quantize(x, (scale, zero_point), spec), expected, rtol=1e-12, atol=1e-12)


def test_the_percentile_search_takes_the_share_of_least_error_over_the_whole_tensor() -> None:
    sample = drawn(200, 5) ** 3
    spec = QuantSpec.parse("int4:tensor:asym:percentile").model_copy(update={"percentiles": (0.9, 0.98, 0.999, 1.0)})
    found, flat = fit_activation(sample, spec), sample.flatten()
    errors = []
    for share in spec.percentiles:
        low, high = (torch.quantile(flat, q) for q in (1 - share, share))
        scale = (high - low) / 15
        errors.append(squared_error(sample, (scale, torch.round(-low / scale)), spec))
    assert squared_error(sample, found, spec) == pytest.approx(min(errors))
    assert errors.index(min(errors)) not in (0, 3)
    assert squared_error(sample, found, spec) < squared_error(
        sample, fit_activation(sample, QuantSpec.parse("int4:tensor:asym")), spec
    )


@pytest.mark.parametrize("shift", ["sym", "asym"])
def test_a_dynamic_format_measures_every_token_on_its_own(shift: str) -> None:
    x, spec = drawn(2, 3, 8) * torch.tensor([1.0, 10, 1000])[:, None], QuantSpec.parse(f"int8:token:{shift}")
    scale, zero_point = measure(x, spec)
    assert scale.shape == zero_point.shape == (2, 3, 1)
    together = fake_quantize(x, (torch.ones(()), torch.zeros(())), spec)
    for batch in range(2):
        for token in range(3):
            row = x[batch, token]
            alone = fake_quantize(row[None], measure(row[None], spec), spec)[0]
            low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
            step = (high - low) / 255 if shift == "asym" else 2 * max(-low, high) / 255
            assert float(scale[batch, token]) == pytest.approx(step)
            assert torch.equal(together[batch, token], alone)
            assert float((alone - row).abs().max()) <= 0.5 * step * (1 + 1e-9)


def test_a_dynamic_tensor_format_measures_each_call() -> None:
    spec, none = QuantSpec.parse("int8:tensor:dynamic:asym"), (torch.ones(()), torch.zeros(()))
    for factor in (1e-6, 1.0, 1e6):
        x = drawn(4, 5) * factor
        static = QuantSpec.parse("int8:tensor:asym")
        assert torch.equal(fake_quantize(x, none, spec), fake_quantize(x, fit_activation(x, static), static))


def test_tiny_tokens_are_not_lost_to_the_range_of_float16() -> None:
    x, none = drawn(3, 8).float() * 1e-8, (torch.ones(()), torch.zeros(()))
    torch.testing.assert_close(fake_quantize(x, none, QuantSpec.parse("int8:token")), x, rtol=0, atol=3e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32_and_come_back_as_they_came(dtype: torch.dtype) -> None:
    x, spec = drawn(20, 6).to(dtype), QuantSpec.parse("int8:tensor:asym")
    scales = fit_activation(x.float(), spec)
    out = fake_quantize(x, scales, spec)
    assert out.dtype == dtype
    assert torch.equal(out, fake_quantize(x.float(), scales, spec).to(dtype))


def test_a_channel_without_values_takes_the_mean_scale_of_the_others() -> None:
    sample = drawn(30, 4)
    sample[:, 2] = 0
    scale, zero_point = fit_activation(sample, QuantSpec.parse("int4:channel:asym"))
    live = fit_activation(sample[:, [0, 1, 3]], QuantSpec.parse("int4:channel:asym"))[0]
    torch.testing.assert_close(scale[[0, 1, 3]], live, rtol=0, atol=0)
    torch.testing.assert_close(scale[2], live.mean(), rtol=1e-12, atol=0)
    assert not bool(fake_quantize(sample, (scale, zero_point), QuantSpec.parse("int4:channel:asym"))[:, 2].any())
    assert bool(torch.isfinite(fit_activation(torch.zeros(3, 2), QuantSpec.parse("int4:channel:asym"))[0]).all())


@pytest.mark.parametrize("kind", ["log2", "logsqrt2"])
def test_a_logarithmic_scale_is_the_best_percentile_or_the_maximum(kind: str) -> None:
    sample = torch.softmax(drawn(300, 40) * 4, dim=-1)
    scale, zero_point = fit_activation(sample, QuantSpec.parse(f"{kind}-4:tensor"))
    assert float(scale) == float(sample.max()) and float(zero_point) == 0
    spec = QuantSpec.parse(f"{kind}-3:tensor:percentile").model_copy(update={"percentiles": (0.7, 0.99, 0.999, 1.0)})
    tops = [torch.quantile(sample.flatten(), share) for share in spec.percentiles]
    errors = [squared_error(sample, (top, torch.zeros(())), spec) for top in tops]
    assert squared_error(sample, fit_activation(sample, spec), spec) == pytest.approx(min(errors))


def test_twin_parameters_are_the_best_split_or_the_two_signs() -> None:
    spec = QuantSpec.parse("twin4:tensor")
    positive = torch.softmax(drawn(100, 30) * 3, dim=-1)
    found = fit_activation(positive, spec)
    top = float(positive.max())
    tries = [torch.tensor([top * 2.0**-i / 7, top / 7, top * 2.0**-i]) for i in range(1, 20)]
    errors = [squared_error(positive, (twin, torch.zeros(())), spec) for twin in tries]
    assert squared_error(positive, found, spec) == pytest.approx(min(errors))
    gelu = torch.nn.functional.gelu(drawn(100, 30))
    low, high, split = fit_activation(gelu, spec)[0].tolist()
    assert (low, high, split) == (pytest.approx(-float(gelu.min()) / 7), pytest.approx(float(gelu.max()) / 7), 0)


@pytest.mark.parametrize(
    "text",
    [
        "int4:tensor",
        "int4:tensor:asym",
        "int4:tensor:narrow",
        "int4:channel:asym",
        "int4:tensor:unsigned",
        "log2-4:tensor",
    ],
)
def test_the_covered_range_is_what_huge_inputs_are_clipped_to(text: str) -> None:
    spec = QuantSpec.parse(text)
    sample = drawn(40, 3).abs() if spec.kind != "int" else drawn(40, 3)
    scales = fit_activation(sample, spec)
    clipped = fake_quantize(torch.tensor([[-1e9] * 3, [1e9] * 3], dtype=torch.float64), scales, spec)
    assert covered_range(scales, spec) == (pytest.approx(float(clipped.min())), pytest.approx(float(clipped.max())))


def test_the_covered_range_of_twins_and_of_dynamic_formats() -> None:
    spec = QuantSpec.parse("twin4:tensor")
    assert covered_range((torch.tensor([0.5, 2.0, 0.0]), torch.zeros(())), spec) == (-3.5, 14)
    assert covered_range((torch.tensor([0.5, 2.0, 3.5]), torch.zeros(())), spec) == (0, 14)
    assert covered_range((torch.ones(()), torch.zeros(())), QuantSpec.parse("int8:token")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8:token", "has no calibrated range"),
        ("int8:tensor:dynamic", "has no calibrated range"),
        ("int4:g2", "use tensor or channel granularity"),
        ("log2-4", "write log2-4:tensor"),
        ("log2-4:tensor", "holds values from 0 up, got a minimum of -"),
    ],
)
def test_a_format_that_cannot_be_calibrated_says_why(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        fit_activation(drawn(10, 4), QuantSpec.parse(text))


@pytest.mark.parametrize("text", ["int8:channel:dynamic", "log2-4:tensor:dynamic", "int8:g2:dynamic"])
def test_a_dynamic_format_that_cannot_be_measured_says_what_can(text: str) -> None:
    with pytest.raises(SpecError, match="use intB:token or intB:tensor:dynamic"):
        measure(drawn(3, 4).abs(), QuantSpec.parse(text))


def test_log_codes_of_probabilities_agree_with_their_definition() -> None:
    spec, x = QuantSpec.parse("logsqrt2-4:tensor"), torch.softmax(drawn(4, 9) * 5, dim=-1)
    out = fake_quantize(x, (torch.ones((), dtype=torch.float64), torch.zeros(())), spec)
    for value, found in zip(x.flatten().tolist(), out.flatten().tolist(), strict=True):
        k = round(-2 * math.log2(value))
        assert found == pytest.approx(0.0 if k >= 15 else 2.0 ** (-k / 2))
        assert found == pytest.approx(float(decode_reference(k)), abs=1e-12)


def decode_reference(k: int) -> float:
    """The integer-friendly decoding as published: a shift by ceil(k / 2) and one of two factors by parity."""
    return 0.0 if k >= 15 else 2.0 ** -math.ceil(k / 2) * (1 + (k % 2) * (math.sqrt(2) - 1))


def test_fake_quantization_agrees_with_encode_and_decode_and_leaves_its_input_alone() -> None:
    x, spec = drawn(3, 5), QuantSpec.parse("int3:channel:asym")
    scales, before = fit_activation(x, spec), x.clone()
    codes = encode(x, *scales, spec)
    assert torch.equal(fake_quantize(x, scales, spec), decode(codes, *scales))
    assert torch.equal(x, before)
