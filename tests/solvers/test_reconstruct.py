"""Reconstruction of blocks that are plain functions: never worse than the start, and close to the best there is."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dither.errors import NonFiniteError
from dither.formats.fit import fit_uniform
from dither.formats.spec import QuantSpec
from dither.solvers.learned import LearnedGrid, LearnedTensor, Learning
from dither.solvers.reconstruct import Loss, Schedule, reconstruct_


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(inputs: Tensor, weight: Tensor) -> Loss:
    """A block that is one layer: inputs [samples, tokens, i]."""

    def loss(values: Mapping[str, Tensor], samples: Sequence[int]) -> Tensor:
        x = inputs[list(samples)]
        return (x @ values["w"].T - x @ weight.T).square().mean()

    return loss


def learned(weight: Tensor, text: str = "int3:g4:asym:tight", **how: Any) -> LearnedGrid:
    return LearnedGrid(weight, fit_uniform(weight, QuantSpec.parse(text)), Learning(**how))


def test_without_iterations_the_start_stays() -> None:
    weight, one = draw(6, 8), learned(draw(6, 8))
    before = one.value()
    found = reconstruct_({"w": one}, linear(draw(4, 5, 8, seed=1), weight), 4, Schedule(0), generator())
    assert torch.equal(one.value(), before)
    assert found.before == found.after
    assert found.iteration == 0


@pytest.mark.parametrize("rule", ["sign", "momentum", "adam"])
@pytest.mark.parametrize("text", ["int2:g4:asym:tight", "int3:g8:sym", "int2:g4:asym:tight:realzero:s4.3"])
def test_correlated_inputs_are_fitted_better_than_by_nearest_codes(rule: Any, text: str) -> None:
    ratios = []
    for seed in range(3):
        weight, mixing = draw(6, 16, seed=seed), draw(6, 16, seed=seed + 20)
        inputs = draw(16, 8, 6, seed=seed + 10) @ mixing + 0.3 * draw(16, 8, 16, seed=seed + 30)
        loss, one = linear(inputs, weight), learned(weight, text, rule=rule)
        start = float(loss({"w": one.value()}, range(16)))
        reconstruct_({"w": one}, loss, 16, Schedule(40, 1 / 40, 4), generator())
        ratios.append(float(loss({"w": one.value()}, range(16))) / start)
    assert sum(ratios) / 3 < 0.95  # measured: 0.40 to 0.87
    assert max(ratios) <= 1.0


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_the_loss_never_ends_above_the_start(rate: float) -> None:
    weight, inputs = draw(4, 6), torch.eye(6).expand(3, 6, 6)  # nearest codes are the best there are
    loss, one = linear(inputs, weight), learned(weight, "int3:channel:asym", range_rate=0.0)
    before = one.value()
    found = reconstruct_({"w": one}, loss, 3, Schedule(20, rate=rate, batch_size=1), generator())
    assert found.after <= found.before
    assert float(loss({"w": one.value()}, range(3))) <= float(loss({"w": before}, range(3)))


def test_on_a_tiny_row_it_comes_close_to_trying_all_codes() -> None:
    ratios = []
    for seed in range(3):
        weight, inputs = draw(1, 4, seed=seed), draw(4, 6, 2, seed=seed + 50) @ draw(2, 4, seed=seed + 90)
        inputs = inputs + 0.2 * draw(4, 6, 4, seed=seed + 30)
        one = learned(weight, "int2:channel:asym:tight", range_rate=0.0)
        grid, loss = one.stored().grid, linear(inputs, weight)
        tried = (grid.decode(torch.tensor([codes], dtype=torch.float32)) for codes in product(range(4), repeat=4))
        best = min(float(loss({"w": value}, range(4))) for value in tried)
        start = float(loss({"w": one.value()}, range(4)))
        reconstruct_({"w": one}, loss, 4, Schedule(60, 1 / 60, 4, checks=5), generator())
        ratios.append((float(loss({"w": one.value()}, range(4))) - best) / max(start - best, 1e-9))
    assert sum(ratios) / len(ratios) < 0.7  # of the way from nearest codes to the best, this is left
    assert min(ratios) < 0.1


def test_the_same_generator_gives_the_same_codes_and_another_one_others() -> None:
    weight, inputs, codes = draw(8, 16), draw(16, 8, 16, seed=1) @ draw(16, 16, seed=2), []
    for seed in (0, 0, 1):
        one = learned(weight, "int2:g4:asym:tight")
        reconstruct_({"w": one}, linear(inputs, weight), 16, Schedule(20, 1 / 20, 2), generator(seed))
        codes.append(one.stored().codes)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_every_sample_is_drawn_once_before_any_is_drawn_again() -> None:
    drawn: list[int] = []

    def loss(values: Mapping[str, Tensor], samples: Sequence[int]) -> Tensor:
        drawn.extend(samples)
        assert list(samples) == sorted(samples)
        return values["w"].square().mean()

    reconstruct_({"w": learned(draw(2, 4))}, loss, 6, Schedule(4, batch_size=3, checked=1, checks=0), generator())
    assert sorted(drawn[1:7]) == list(range(6))
    assert sorted(drawn[7:]) == list(range(6))


def test_other_tensors_are_learned_with_the_weights_and_unused_ones_stay() -> None:
    weight, inputs = draw(6, 8), draw(8, 5, 8, seed=1)
    scale, unused = LearnedTensor(torch.ones(6), "adam", 1.0), LearnedTensor(torch.ones(3), "adam", 1.0)

    def loss(values: Mapping[str, Tensor], samples: Sequence[int]) -> Tensor:
        x = inputs[list(samples)]
        return (x @ values["w"].T * values["scale"] - 1.1 * x @ weight.T).square().mean()

    fixed = learned(weight, "int4:g4:asym:tight", offset_rate=0.0, range_rate=0.0)
    everything = {"w": fixed, "scale": scale, "unused": unused}
    reconstruct_(everything, loss, 8, Schedule(50, rate=0.02, batch_size=4), generator())
    assert float((scale.value() - 1.1).abs().max()) < 0.06
    assert torch.equal(unused.value(), torch.ones(3))


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        reconstruct_(
            {"w": learned(draw(2, 4))}, lambda values, samples: values["w"].sum() / 0, 2, Schedule(2), generator()
        )
