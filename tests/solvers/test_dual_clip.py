"""Learned clips: better than any common shrink, kept where nothing is better, the same as what is stored."""

import pytest
import torch
from torch import Tensor

from dither.formats.activation import fake_quantize
from dither.formats.spec import QuantSpec
from dither.solvers.dual_clip import clipped, learn_clips

ASYM, SYM = QuantSpec.parse("int4:channel:asym"), QuantSpec.parse("int4:channel:sym")


def heavy(rows: int = 600, channels: int = 10) -> Tensor:
    """Channels with a few far values, each around a mean of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, generator=generator)
    return torch.where(x.abs() > 2.5, 3 * x, x) + torch.linspace(-3, 5, channels)


def readers() -> Tensor:
    return torch.randn(7, 10, generator=torch.Generator().manual_seed(1))


def learned(rows: Tensor, spec: QuantSpec, steps: int = 200):  # type: ignore[no-untyped-def]
    ends = rows.amin(dim=0), rows.amax(dim=0)
    ends = ends if spec.symmetry == "asym" else (-rows.abs().amax(dim=0), rows.abs().amax(dim=0))
    return learn_clips(rows, readers(), ends, spec, steps, 0.05, 128, torch.Generator().manual_seed(2))


def output_error(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> float:
    return float(((clipped(rows, low, high, spec) - rows) @ readers().T).square().sum() / len(rows))


@pytest.mark.parametrize("spec", [ASYM, SYM])
def test_clips_lower_the_output_error_below_that_of_every_common_shrink(spec: QuantSpec) -> None:
    rows = heavy()
    found = learned(rows, spec)
    assert found.after == pytest.approx(output_error(rows, found.low, found.high, spec), rel=1e-4)
    centre = rows.mean(dim=0) if spec.symmetry == "asym" else torch.zeros(10)
    low = rows.amin(dim=0) if spec.symmetry == "asym" else -rows.abs().amax(dim=0)
    high = rows.amax(dim=0) if spec.symmetry == "asym" else rows.abs().amax(dim=0)
    shrunk = [
        output_error(rows, centre + s * (low - centre), centre + s * (high - centre), spec)
        for s in torch.linspace(0.2, 1, 40).tolist()
    ]
    assert found.before == pytest.approx(shrunk[-1], rel=1e-4)
    assert found.after < min(shrunk) < found.before
    if spec.symmetry != "asym":
        assert torch.equal(found.low, -found.high)


def test_without_steps_the_start_is_kept() -> None:
    rows = heavy()
    found = learned(rows, ASYM, steps=0)
    assert torch.equal(found.low, rows.amin(dim=0))
    assert found.before == found.after


@pytest.mark.parametrize("spec", [ASYM.model_copy(update={"zero_point": "real"}), SYM])
def test_the_clipped_values_are_those_of_the_stored_quantizer(spec: QuantSpec) -> None:
    rows = heavy()
    high = rows.abs().amax(dim=0) * 0.8
    low = rows.amin(dim=0) * 0.7 if spec.symmetry == "asym" else -high
    scale = (high - low) / 15
    zero = -low / scale if spec.symmetry == "asym" else torch.full_like(scale, 8.0)
    expected = fake_quantize(rows, (scale, zero), spec)
    torch.testing.assert_close(clipped(rows, low, high, spec), expected, rtol=1e-4, atol=1e-4)


def test_a_dead_channel_keeps_a_range_and_does_no_harm() -> None:
    rows = heavy()
    rows[:, 3] = 0.0
    found = learn_clips(
        rows, readers(), (rows.amin(dim=0) - 1, rows.amax(dim=0) + 1), ASYM, 50, 0.05, 128, torch.Generator()
    )
    assert bool((found.high > found.low).all())
    assert bool(torch.isfinite(clipped(rows, found.low, found.high, ASYM)).all())


def test_each_end_moves_on_its_own() -> None:
    rows = torch.randn(800, 10, generator=torch.Generator().manual_seed(3))
    rows = torch.where(rows > 2.2, 3 * rows, rows)
    found = learned(rows, ASYM)
    centre, reach = rows.mean(dim=0), (rows.amin(dim=0) - rows.mean(dim=0), rows.amax(dim=0) - rows.mean(dim=0))
    low, high = (found.low - centre) / reach[0], (found.high - centre) / reach[1]
    assert float((low - high).abs().mean()) > 0.05
    swapped = output_error(rows, centre + high * reach[0], centre + low * reach[1], ASYM)
    assert found.after < 0.98 * swapped
