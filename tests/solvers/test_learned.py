"""Learned weights: the start is plain rounding, written gradients agree with autograd's, codes stay on their grid."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dither.errors import SpecError
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid, fit_uniform
from dither.formats.low_rank import LowRank
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.solvers.affine import fit_signed
from dither.solvers.learned import Learned, LearnedGrid, LearnedTensor, Learning
from dither.solvers.learned_codebook import LearnedCodebook
from dither.solvers.learned_sum import LearnedSum

FORMATS = ["int3:g4:sym", "int3:channel:asym:tight", "int2:g4:asym:tight:realzero", "int4:tensor:asym", "int1:tensor"]
FORMATS += [
    "int3:g4:ic:asym",
    "int3:g4:narrow",
    "int3:channel:unsigned",
    "int3:g4:asym:tight:realzero:s4.3",
    "mxint3:g4",
]
FORMATS += ["int3:g4:pow2"]


def matrix(rows: int = 8, columns: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def on_grid(text: str, **how: Any) -> LearnedGrid:
    return LearnedGrid(matrix(), fit_uniform(matrix(), QuantSpec.parse(text)), Learning(**how))


def on_levels(text: str, **how: Any) -> LearnedCodebook:
    spec = QuantSpec.parse(text)
    if spec.kind != "nuq":
        book = fit_grid(matrix(), spec)
        assert isinstance(book, Codebook)
        return LearnedCodebook(matrix(), book, Learning(**how))
    levels = torch.linspace(-1.5, 1.7, spec.levels).pow(3).expand(8, 1, -1) * torch.linspace(0.5, 1, 8)[:, None, None]
    return LearnedCodebook(matrix(), Codebook.of_levels(spec, levels), Learning(**how))


@pytest.mark.parametrize("text", FORMATS)
def test_the_start_is_rounding_to_nearest_on_the_grid_given(text: str) -> None:
    grid, learned = fit_uniform(matrix(), QuantSpec.parse(text)), on_grid(text)
    torch.testing.assert_close(learned.value(), grid.round(matrix()), rtol=0, atol=0)
    assert torch.equal(learned.stored().codes, quantize(matrix(), grid).codes)
    assert isinstance(learned, Learned)


def test_a_signed_grid_keeps_its_signs() -> None:
    grid = fit_signed(matrix(), QuantSpec.parse("int3:g4:sym"))
    learned = LearnedGrid(matrix(), grid, Learning())
    assert bool((grid.scale < 0).any()) and bool((grid.scale > 0).any())
    torch.testing.assert_close(learned.value(), grid.round(matrix()), rtol=0, atol=0)
    learned.step_(matrix(seed=1), 0.02)
    assert torch.equal(learned.stored().grid.scale.sign(), grid.scale.sign())


def test_groups_in_another_order_are_learned_alike() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    plain = fit_uniform(matrix(), QuantSpec.parse("int3:g4:asym"))
    assert plain.column_of is not None
    mixed = replace(plain, column_of=plain.column_of[order])
    one, two = LearnedGrid(matrix(), plain, Learning()), LearnedGrid(matrix()[:, order], mixed, Learning())
    for seed in range(3):
        torch.testing.assert_close(one.value()[:, order], two.value(), rtol=0, atol=0)
        one.step_(matrix(seed=seed), 0.05)
        two.step_(matrix(seed=seed)[:, order], 0.05)
    assert torch.equal(one.stored().codes[:, order], two.stored().codes)


@pytest.mark.parametrize("text", [f for f in FORMATS if not f.startswith("mxint")])
@pytest.mark.parametrize("kind", ["sign", "momentum", "adam"])
def test_what_is_stored_is_the_value_and_rounds_to_itself_after_steps(text: str, kind: Any) -> None:
    learned = on_grid(text, rule=kind, widest=1.5)
    for seed in range(4):
        learned.value()
        learned.step_(matrix(seed=seed), 0.05)
    value, stored = learned.value(), learned.stored()
    torch.testing.assert_close(stored.dequantize(), value, rtol=1e-6, atol=1e-6)
    assert torch.equal(quantize(stored.dequantize(), stored.grid).codes, stored.codes)
    assert int(stored.codes.max()) < stored.spec.levels


class _Through(torch.autograd.Function):
    """Rounding that gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def through(x: Tensor) -> Tensor:
    result: Tensor = _Through.apply(x)  # type: ignore[no-untyped-call]
    return result


def recorded(learned: LearnedGrid, gradient: Tensor) -> list[Tensor]:
    """The gradients that a step hands to the descents: of the range factors, then of the offsets."""
    seen: list[Tensor] = []
    for descent in learned._descents:
        descent.step_ = lambda parameter, slope, rate: seen.append(slope.clone())  # type: ignore[method-assign]
    learned.step_(gradient, 1.0)
    return seen


def moved(low: Tensor, high: Tensor, ends: list[Tensor], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The ends of ranges scaled by their factors: from zero, or from the middle where zero need not be inside."""
    middle = torch.zeros_like(low) if spec.include_zero else (low + high) / 2
    return middle + (low - middle) * ends[0], middle + (high - middle) * ends[1]


@pytest.mark.parametrize("text", ["int2:g4:asym:tight", "int2:g4:asym:tight:realzero", "int2:g4:asym:realzero"])
def test_written_gradients_of_an_asymmetric_grid_are_autograds(text: str) -> None:
    spec, real = QuantSpec.parse(text).model_copy(update={"scale_dtype": "float32"}), "realzero" in text
    grid, gradient = fit_uniform(matrix() * 0.9, spec), matrix(seed=5)
    learned = LearnedGrid(matrix(), grid, Learning())
    learned.value()
    found = recorded(learned, gradient)
    ends = [torch.ones(8, 3, 1, requires_grad=True) for _ in range(2)]
    offset = torch.zeros(8, 3, 4, requires_grad=True)
    low, high = ((-grid.zero_point * grid.scale)[..., None], ((3 - grid.zero_point) * grid.scale)[..., None])
    bottom, top = moved(low, high, ends, spec)
    scale = (top - bottom) / 3
    zero = -bottom / scale
    steps = matrix().reshape(8, 3, 4) / scale + offset
    codes = through(steps + zero) if real else through(steps) + through(zero)
    value = scale * (codes.clamp(0, 3) - (zero if real else through(zero)))
    (value * gradient.reshape(8, 3, 4)).sum().backward()
    wanted = [ends[0].grad, ends[1].grad, offset.grad]
    for mine, true in zip(found, wanted, strict=True):
        assert true is not None
        torch.testing.assert_close(mine.flatten(), true.flatten(), rtol=1e-3, atol=1e-4)


def test_written_gradients_of_a_symmetric_grid_are_autograds() -> None:
    spec = QuantSpec.parse("int2:g4:sym").model_copy(update={"scale_dtype": "float32"})
    grid, gradient = fit_uniform(matrix(), spec), matrix(seed=5)
    learned = LearnedGrid(matrix(), grid, Learning())
    learned.value()
    found = recorded(learned, gradient)
    factor, offset = torch.ones(8, 3, 1, requires_grad=True), torch.zeros(8, 3, 4, requires_grad=True)
    scale = grid.scale[..., None] * factor
    value = scale * through(matrix().reshape(8, 3, 4) / scale + offset).clamp(-2, 1)
    (value * gradient.reshape(8, 3, 4)).sum().backward()
    for mine, true in zip(found, [factor.grad, offset.grad], strict=True):
        assert true is not None
        torch.testing.assert_close(mine.flatten(), true.flatten(), rtol=1e-3, atol=1e-4)


def test_with_codes_as_they_are_the_range_gradient_is_the_true_slope() -> None:
    spec = QuantSpec.parse("int2:g4:asym:tight:realzero").model_copy(update={"scale_dtype": "float32"})
    grid, gradient = fit_uniform(matrix(), spec), matrix(seed=5)
    learned = LearnedGrid(matrix(), grid, Learning(range_gradient="codes"))
    learned.value()
    found, codes = recorded(learned, gradient), learned.stored().codes.float().reshape(8, 3, 4)
    ends = [torch.ones(8, 3, 1, requires_grad=True) for _ in range(2)]
    low, high = ((-grid.zero_point * grid.scale)[..., None], ((3 - grid.zero_point) * grid.scale)[..., None])
    bottom, top = moved(low, high, ends, spec)
    ((bottom + (top - bottom) / 3 * codes) * gradient.reshape(8, 3, 4)).sum().backward()
    for mine, end in zip(found[:2], ends, strict=True):
        assert end.grad is not None
        torch.testing.assert_close(mine.flatten(), end.grad.flatten(), rtol=1e-3, atol=1e-4)


def test_offsets_and_ranges_stay_within_their_bounds() -> None:
    learned = on_grid("int3:g4:asym:tight", widest=1.1, reach=0.3)
    for _ in range(20):
        learned.value()
        learned.step_(-matrix(), 0.2)
    offset, low, high = learned.state
    assert float(offset.abs().max()) == pytest.approx(0.3)
    assert 0 <= float(torch.cat([low, high]).min()) <= float(torch.cat([low, high]).max()) <= 1.1 + 1e-6


def test_a_narrow_range_far_from_zero_stays_one() -> None:
    weight = 5 + matrix() / 100
    spec = QuantSpec.parse("int2:g4:asym:tight:realzero").model_copy(update={"scale_dtype": "float32"})
    grid = fit_uniform(weight, spec)
    learned, generator = LearnedGrid(weight, grid, Learning()), torch.Generator().manual_seed(0)
    for step in range(50):  # factors of the ends themselves would let them meet, and zero-points overflow
        learned.value()
        learned.step_(torch.randn(weight.shape, generator=generator), (50 - step) / 2500)
    assert float((learned.stored().dequantize() - weight).abs().max()) < 0.1


def test_a_state_brings_back_the_value() -> None:
    for learned in (on_grid("int3:g4:asym"), on_levels("nuq2:channel"), on_levels("nf4:g4")):
        before, state = learned.value(), learned.state
        learned.step_(matrix(seed=2), 0.2)
        assert not torch.equal(learned.value(), before)
        learned.restore_(state)
        assert torch.equal(learned.value(), before)


def test_dual_grids_are_refused() -> None:
    with pytest.raises(SpecError, match="leave out dual"):
        on_grid("int3:channel:dual")


@pytest.mark.parametrize("text", ["nf4:g4", "nf4:g4:s8.4", "fp4:channel", "nuq2:channel", "nuq3:channel"])
def test_a_codebook_starts_at_its_nearest_levels_and_stores_what_it_shows(text: str) -> None:
    learned = on_levels(text, widest=1.2)
    torch.testing.assert_close(learned.value(), learned._start.round(matrix()), rtol=0, atol=0)
    for seed in range(3):
        learned.value()
        learned.step_(matrix(seed=seed), 0.05)
    stored = learned.stored()
    torch.testing.assert_close(stored.dequantize(), learned.value(), rtol=0, atol=0)
    again = type(stored).unpack(stored.pack(), stored.layout)
    assert torch.equal(again.dequantize(), stored.dequantize())


def test_levels_move_against_the_gradient_of_the_weights_that_use_them() -> None:
    learned = on_levels("nuq2:channel", offset_rate=0.0)
    for _ in range(30):
        learned.step_(learned.value() - matrix(), 0.02)  # the gradient of half the squared error
    start = learned._start.round(matrix()) - matrix()
    assert float((learned.value() - matrix()).square().sum()) < 0.8 * float(start.square().sum())


def test_kept_entries_and_a_low_rank_term_are_added_to_the_learned_codes() -> None:
    low_rank = LowRank.of(matrix(2, 12, seed=3) * 0.1, matrix(8, 2, seed=4))
    rest, kept = matrix() - low_rank.dense(), matrix(seed=6) > 1.2
    coded = LearnedGrid(rest, fit_uniform(rest, QuantSpec.parse("int3:g4:asym")), Learning())
    whole = LearnedSum(matrix(), coded, kept, low_rank)
    for seed in range(3):
        value = whole.value()
        assert torch.equal(value[kept], matrix()[kept])
        whole.step_(matrix(seed=seed), 0.05)
    torch.testing.assert_close(whole.stored().dequantize(), whole.value(), rtol=1e-3, atol=1e-3)
    assert not bool(coded.state[0].reshape(8, 12)[kept].any())
    assert isinstance(whole, Learned)


def test_a_tensor_is_learned_in_units_of_its_size() -> None:
    learned = LearnedTensor(torch.full((4,), 3.0), "sign", 0.5)
    learned.step_(torch.tensor([1.0, -1.0, 0.0, 2.0]), 0.1)
    torch.testing.assert_close(learned.value(), torch.tensor([2.85, 3.15, 3.0, 2.85]))
