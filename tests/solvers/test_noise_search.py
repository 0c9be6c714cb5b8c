"""The reach of the noise: brute force over the output's error, and the theorem's own choice."""

import pytest
import torch
from torch import Tensor

from dither.formats.activation import fake_quantize
from dither.formats.spec import QuantSpec
from dither.solvers.noise_search import noise_by_condition, search_noise
from dither.solvers.output_search import Target
from dither.statistics.extremes import MinMax
from dither.statistics.output_rows import OutputRows
from dither.transforms.noisy_bias import noise_direction

SPEC = QuantSpec.parse("int4:tensor:sym")
SCALES = (torch.tensor(0.5), torch.tensor(8.0))
REACHES = torch.linspace(0.05, 2, 40)


def off_centre(share: float, spread: float = 0.02) -> OutputRows:
    """Values that crowd at `share` of a bin's half width from its centre, 64 channels."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-4, 4, (200, 64), generator=generator)
    inputs = 0.5 * codes + 0.25 * share + spread * torch.randn(200, 64, generator=generator)
    return OutputRows(inputs, None, MinMax.of(inputs))


def weight() -> Tensor:
    return torch.randn(10, 64, generator=torch.Generator().manual_seed(1))


def direction() -> Tensor:
    return noise_direction(64, "uniform", torch.Generator().manual_seed(2))


@pytest.mark.parametrize("mean", [False, True])
def test_the_search_finds_what_brute_force_finds_and_says_it(mean: bool) -> None:
    rows, target = off_centre(0.9), Target.of(off_centre(0.9), weight())
    noise = search_noise(rows, SPEC, SCALES, weight(), target, direction(), REACHES, mean)
    assert noise.offset is not None

    def error(offset: Tensor) -> float:
        seen = fake_quantize(rows.inputs, SCALES, SPEC, offset) - offset
        return float(target.errors(seen @ weight().T).sum())

    assert noise.before == pytest.approx(error(torch.zeros(64)))
    assert noise.after == pytest.approx(error(noise.offset.half().float()))
    if not mean:
        brute = [error((direction() * float(reach) * 0.5).half().float()) for reach in REACHES]
        assert noise.after == pytest.approx(min(brute))
        assert noise.reach == float(REACHES[brute.index(min(brute))])
    assert noise.after < 0.4 * noise.before  # measured: 0.26, with a shift 0.005, as all values lie alike


def test_values_at_centres_get_no_noise() -> None:
    rows = off_centre(0.0)
    noise = search_noise(rows, SPEC, SCALES, weight(), Target.of(rows, weight()), direction(), REACHES)
    assert noise.offset is None and noise.after == noise.before
    assert noise_by_condition(rows, SPEC, SCALES, direction(), REACHES) == (None, 0.0)


def test_the_condition_takes_the_reach_of_least_mean_error_of_the_input() -> None:
    rows = off_centre(0.9)
    offset, reach = noise_by_condition(rows, SPEC, SCALES, direction(), REACHES)
    assert offset is not None
    torch.testing.assert_close(offset, direction() * reach * 0.5)

    def error(reach: float) -> float:
        """Over many draws of the noise, as the theorem's mean."""
        generator = torch.Generator().manual_seed(3)
        noise = reach * 0.5 * (2 * torch.rand(rows.inputs.shape, generator=generator) - 1)
        seen = fake_quantize(rows.inputs + noise, SCALES, SPEC) - noise
        return float((seen - rows.inputs).square().mean())

    errors = [error(float(one)) for one in REACHES]
    assert error(reach) == pytest.approx(min(errors), rel=0.02)
    assert error(reach) < 0.7 * error(0.0)


def test_a_twin_is_judged_by_the_step_of_each_side() -> None:
    spec = QuantSpec.parse("twin4:tensor")
    scales = torch.tensor([0.02, 0.5, 0.0]), torch.tensor(0.0)
    inputs = torch.cat([torch.full((50, 8), -0.06), torch.full((50, 8), 1.0)])  # both on levels
    rows = OutputRows(inputs, None, MinMax.of(inputs))
    assert noise_by_condition(rows, spec, scales, torch.ones(8), REACHES) == (None, 0.0)
    inputs = torch.cat([torch.full((50, 8), -0.06), torch.full((50, 8), 1.249)])
    rows = OutputRows(inputs, None, MinMax.of(inputs))
    assert noise_by_condition(rows, spec, scales, torch.ones(8), REACHES)[1] > 0
