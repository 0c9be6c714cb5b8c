"""Activation quantizers as modules: what they hold, how they move and load."""

import copy

import pytest
import torch
from torch import Tensor

from dither.errors import NonFiniteError
from dither.formats.activation import fake_quantize, fit_activation
from dither.formats.spec import QuantSpec
from dither.nn.activation import ActivationQuantizer

TEXTS = [
    "int4:tensor:asym",
    "int4:channel:asym",
    "int8:token",
    "int8:tensor:dynamic",
    "logsqrt2-4:tensor",
    "twin4:tensor",
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(text: str) -> ActivationQuantizer:
    spec = QuantSpec.parse(text)
    quantizer = ActivationQuantizer(spec, channels=6)
    return quantizer if spec.dynamic else quantizer.set(fit_activation(drawn(50, 6), spec))


@pytest.mark.parametrize("text", TEXTS)
def test_it_puts_its_input_on_the_grid_of_its_format(text: str) -> None:
    quantizer, x = fitted(text), drawn(2, 5, 6, seed=1)
    assert torch.equal(quantizer(x), fake_quantize(x, quantizer.scales, quantizer.spec))
    assert float((quantizer(x) - x).abs().max()) > 0
    assert quantizer.extra_repr() == str(quantizer.spec)


@pytest.mark.parametrize("text", TEXTS)
def test_a_fresh_quantizer_takes_the_state_of_a_fitted_one(text: str) -> None:
    quantizer, x = fitted(text), drawn(2, 5, 6, seed=1)
    fresh = ActivationQuantizer(QuantSpec.parse(text), channels=6)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
    assert set(quantizer.state_dict()) == (set() if quantizer.spec.dynamic else {"scale", "zero_point"})


@pytest.mark.parametrize("text", TEXTS)
def test_a_change_of_the_networks_dtype_leaves_scales_as_they_are(text: str) -> None:
    quantizer, x = fitted(text), drawn(2, 5, 6, seed=1)
    before = copy.deepcopy(quantizer.state_dict())
    for moved in (quantizer.half(), quantizer.to(torch.bfloat16), quantizer.double(), quantizer.float()):
        assert {name: part.dtype for name, part in moved.state_dict().items()} == dict.fromkeys(before, torch.float32)
        assert all(torch.equal(part, before[name]) for name, part in moved.state_dict().items())
    assert quantizer(x.half()).dtype == torch.float16


def test_a_scale_below_the_range_of_half_survives_half() -> None:
    quantizer = ActivationQuantizer(QuantSpec.parse("int8:tensor")).set((torch.tensor(1e-9), torch.tensor(128.0)))
    assert float(quantizer.half().scale) == pytest.approx(1e-9)
    x = torch.tensor([[5e-9, -3e-9]])
    torch.testing.assert_close(quantizer(x), x, rtol=1e-6, atol=0)


def test_it_owns_what_was_set() -> None:
    scale = torch.tensor(0.5)
    quantizer = ActivationQuantizer(QuantSpec.parse("int8:tensor")).set((scale, torch.tensor(128.0)))
    scale.zero_()
    assert float(quantizer.scale) == 0.5


@pytest.mark.parametrize("text", TEXTS)
def test_gradients_pass_as_if_nothing_were_quantized(text: str) -> None:
    quantizer, x = fitted(text), drawn(2, 5, 6, seed=1).requires_grad_()
    out = quantizer(x)
    assert torch.equal(out.detach(), quantizer(x.detach()))
    out.backward(torch.full_like(out, 3.0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


@pytest.mark.parametrize("text", TEXTS)
def test_an_offset_moves_the_input_and_is_taken_off_again_in_what_stands_for_it(text: str) -> None:
    offset = drawn(6, seed=2) * 0.1
    quantizer, plain, x = fitted(text).add(offset), fitted(text), drawn(2, 5, 6, seed=1)
    stored = offset.half().float()
    assert torch.equal(quantizer(x), plain(x + stored))
    assert torch.equal(quantizer.approximate(x), plain(x + stored) - stored)
    assert torch.equal(plain.approximate(x), plain(x))
    assert not torch.equal(quantizer(x), plain(x))


def test_an_offset_is_stored_in_float16_loaded_and_copied() -> None:
    spec = QuantSpec.parse("int4:tensor:asym")
    quantizer = fitted("int4:tensor:asym").add(drawn(6, seed=2))
    fresh = ActivationQuantizer(spec, offset=6)
    fresh.load_state_dict(quantizer.state_dict())
    x = drawn(2, 6, seed=1)
    for other in (fresh, quantizer.copy(), copy.deepcopy(quantizer).to(torch.bfloat16)):
        assert other.offset is not None and other.offset.dtype == torch.float16
        assert torch.equal(other(x), quantizer(x))
        assert other.offset.data_ptr() != quantizer.offset.data_ptr()  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="float16"):
        quantizer.add(torch.full((6,), 1e6))
