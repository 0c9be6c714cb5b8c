"""Twin codes: two uniform ranges that share the codes between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.formats.spec import QuantSpec
from dither.formats.twin import decode_twin, encode_twin


def levels(twin: list[float], bits: int) -> list[float]:
    """Every value that a code stands for, low region first."""
    low, high, split = twin
    half = 2 ** (bits - 1)
    return [code * (low if split > 0 else -low) for code in range(half)] + [code * high for code in range(half)]


def softmax_twin(bits: int, power: int) -> list[float]:
    steps = 2 ** (bits - 1) - 1
    return [2.0**-power / steps, 1 / steps, 2.0**-power]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("gelu", [True, False])
def test_each_code_stands_for_a_step_of_its_region(bits: int, gelu: bool) -> None:
    twin = [0.02, 0.5, 0.0] if gelu else softmax_twin(bits, 3)
    codes = torch.arange(2.0**bits, dtype=torch.float64)
    found = decode_twin(codes, torch.tensor(twin, dtype=torch.float64), QuantSpec(kind="twin", bits=bits))
    torch.testing.assert_close(found, torch.tensor(levels(twin, bits), dtype=torch.float64), rtol=1e-12, atol=0)
    assert found[0] == 0 and found[2 ** (bits - 1)] == 0  # zero is exact in both regions


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), power=st.integers(1, 12), gelu=st.booleans(), seed=st.integers(0, 10**6))
def test_a_value_takes_the_nearest_level_of_either_region(bits: int, power: int, gelu: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x: Tensor = torch.rand(400, dtype=torch.float64, generator=generator) ** 4 * 1.1
    x = torch.cat([x, -0.3 * x[:100]]) if gelu else x
    x = torch.cat([x, torch.zeros(1, dtype=torch.float64)]).sort().values
    twin = [0.17 / 2**bits, 2.0 / 2**bits, 0.0] if gelu else softmax_twin(bits, power)
    spec, scale = QuantSpec(kind="twin", bits=bits), torch.tensor(twin, dtype=torch.float64)
    codes = encode_twin(x, scale, spec)
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() < 2**bits
    values, grid = decode_twin(codes, scale, spec), torch.tensor(levels(twin, bits), dtype=torch.float64)
    distance = (x[:, None] - grid).abs().amin(dim=1)
    torch.testing.assert_close((values - x).abs(), distance, rtol=0, atol=1e-12)
    assert bool((values.diff() >= 0).all())
    assert not bool(values[x == 0].any())
    assert len(values.unique()) <= 2**bits
