"""Bisection to a target: the exact threshold of an even metric in few evaluations, and always a feasible result."""

from math import ceil, log2

import numpy as np
import pytest

from dither.allocation.bisection import Choice, Found, bisect, greedy
from dither.errors import InputError

BITS = (16, 8, 4)


def cost(choice: Choice) -> float:
    return float(sum(BITS[option] for option in choice))


class Counted:
    """A metric that counts its calls."""

    def __init__(self, harm: np.ndarray) -> None:
        self.harm, self.calls = harm, list[Choice]()

    def __call__(self, choice: Choice) -> float:
        self.calls.append(choice)
        return 1.0 - sum(float(self.harm[unit, option]) for unit, option in enumerate(choice))


@pytest.mark.parametrize("size", [1, 7, 54])
@pytest.mark.parametrize("target", [0.5, 0.9, 0.99, 0.9999])
def test_an_even_metric_is_met_exactly_in_few_evaluations(size: int, target: float) -> None:
    harm = np.sort(np.random.default_rng(size).uniform(0, 2 / size, size))[:, None] * [0, 0.05, 0.5]
    metric = Counted(harm)
    found = bisect(range(size), (1, 2), (0,) * size, metric, cost, target)
    assert found.evaluations == len(set(metric.calls)) == len(metric.calls) <= 2 * ceil(log2(size + 1))
    eights = next((t for t in range(size, 0, -1) if 1 - harm[:t, 1].sum() >= target), 0)
    after = [harm[:t, 2].sum() + harm[t:eights, 1].sum() for t in range(eights + 1)]
    fours = max(t for t in range(eights + 1) if 1 - after[t] >= target or t == 0)
    assert found.choice == (2,) * fours + (1,) * (eights - fours) + (0,) * (size - eights)


@pytest.mark.parametrize("search", [bisect, greedy])
@pytest.mark.parametrize("seed", range(10))
def test_an_uneven_metric_still_gives_a_configuration_that_meets_the_target(search: object, seed: int) -> None:
    noise = np.random.default_rng(seed)
    known: dict[Choice, float] = {}

    def metric(choice: Choice) -> float:
        return known.setdefault(choice, float(noise.uniform(0.8, 1.0)))

    found: Found = search(range(20), (1, 2), (0,) * 20, metric, cost, 0.9)  # type: ignore[operator]
    assert found.choice == (0,) * 20 or known[found.choice] >= 0.9
    assert found.cost == min([320.0, *(cost(one) for one, value in known.items() if value >= 0.9)])


def test_nothing_meets_an_impossible_target_but_the_start() -> None:
    found = bisect(range(5), (1, 2), (0,) * 5, lambda choice: 0.0, cost, 0.5)
    assert found.choice == (0,) * 5 and found.cost == 80


def test_greedy_passes_over_a_unit_that_breaks_the_target() -> None:
    harm = np.zeros((6, 3))
    harm[2, 1:] = 1.0
    assert greedy(range(6), (1, 2), (0,) * 6, Counted(harm), cost, 0.9).choice == (2, 2, 0, 2, 2, 2)
    assert bisect(range(6), (1, 2), (0,) * 6, Counted(harm), cost, 0.9).choice == (2, 2, 0, 0, 0, 0)


def test_units_have_only_options_that_they_can_have_and_the_order_is_whole() -> None:
    found = bisect(range(4), (1, 2), (0,) * 4, lambda choice: 1.0, cost, 0.9, lambda unit, option: unit != 1)
    assert found.choice == (2, 0, 2, 2)
    with pytest.raises(InputError, match="each of 4 units once"):
        bisect([0, 1, 1, 2], (1,), (0,) * 4, lambda choice: 1.0, cost, 0.9)
