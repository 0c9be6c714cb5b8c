"""Logarithmic codes against explicit tables."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.formats.logarithmic import decode_log, encode_log
from dither.formats.spec import QuantSpec

KINDS = ["log2", "logsqrt2"]


def table(kind: str, bits: int, scale: float) -> list[float]:
    """The value of each code: powers of 2 or of its root from the scale down, and 0 for the last."""
    base = 2.0 if kind == "log2" else math.sqrt(2)
    return [scale * base**-code for code in range(2**bits - 1)] + [0.0]


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("bits", range(1, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_codes_decode_to_their_table_and_values_of_the_table_keep_their_codes(
    kind: str, bits: int, scale: float
) -> None:
    spec, values = QuantSpec(kind=kind, bits=bits), torch.tensor(table(kind, bits, scale), dtype=torch.float64)  # type: ignore[arg-type]
    codes = torch.arange(2.0**bits, dtype=torch.float64)
    top = torch.tensor(scale, dtype=torch.float64)
    torch.testing.assert_close(decode_log(codes, top, spec), values, rtol=1e-12, atol=0)
    assert torch.equal(encode_log(values, top, spec), codes)
    assert len(set(decode_log(codes, top, spec).tolist())) == 2**bits


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), bits=st.integers(1, 8), scale=st.floats(1e-3, 10), seed=st.integers(0, 10**6))
def test_codes_are_rounded_logarithms_monotone_and_no_more_than_the_bits_allow(
    kind: str, bits: int, scale: float, seed: int
) -> None:
    spec, top = QuantSpec(kind=kind, bits=bits), torch.tensor(scale)  # type: ignore[arg-type]
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(seed))
    x = torch.cat([uniform, 2 ** (-40 * uniform), torch.zeros(1)]).sort().values * scale * 1.2
    codes = encode_log(x, top, spec)
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        steps = math.inf if value == 0 else -math.log2(value / float(top)) * (1 if kind == "log2" else 2)
        expected = min(max(steps, 0), 2**bits - 1)
        assert abs(code - expected) <= 0.5 + 1e-4
    values = decode_log(codes, top, spec)
    assert bool((values.diff() >= 0).all())
    assert len(values.unique()) <= 2**bits


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_what_is_below_the_last_power_become_exactly_zero(kind: str) -> None:
    spec, top = QuantSpec(kind=kind, bits=3), torch.tensor(1.0)  # type: ignore[arg-type]
    last = table(kind, 3, 1.0)[-2]
    root = 2.0 if kind == "log2" else math.sqrt(2)
    x = torch.tensor([0.0, -0.1, 1e-30, last / root**0.6, last / root**0.4, 7.0])
    values = decode_log(encode_log(x, top, spec), top, spec)
    assert values[:4].tolist() == [0.0] * 4
    torch.testing.assert_close(values[4:], torch.tensor([last, 1.0]), rtol=1e-6, atol=0)
