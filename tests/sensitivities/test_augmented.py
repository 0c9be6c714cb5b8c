"""Augmented Hessians: couplings are those of the second order, and repair what single layers miss."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dither.allocating import allocate
from dither.allocation.pairwise import pair_costs, pair_score
from dither.allocation.solve import problem_of
from dither.models.losses import class_rows
from dither.sensitivities.augmented import Augmented
from dither.sensitivities.base import rounded
from dither.sensitivity import measure
from dither.statistics.divergence import kl_rows

FORMATS = ["int6:channel:asym:minmax", "int8:channel:asym:minmax"]


def found(odd: Callable[..., Any], pairs: Any, formats: Any = FORMATS) -> tuple[Any, Any, Any]:
    network = odd(depth=1)
    data = network.batch(10, seed=1)
    return network, data, measure(network.model, Augmented(pairs), [data[:4], data[4:]], options=formats)


def test_row_sums_are_own_costs_and_half_of_all_couplings(odd: Callable[..., Any]) -> None:
    sums, matrix = (found(odd, pairs)[2] for pairs in ("rowsum", "hvp"))
    for place in range(2):
        expected = matrix.scores[:, place] + matrix.pairs[place].sum(axis=1) / 2
        usable = matrix.scores[:, place] > 1e-3 * matrix.scores[:, place].max()
        able = usable & (sums.scores[:, place] > 0.02 * np.median(sums.scores[:, place]))
        np.testing.assert_allclose(sums.scores[able, place], expected[able], rtol=2e-3)
        np.testing.assert_allclose(matrix.pairs[place], matrix.pairs[place].T)
        assert (np.abs(matrix.pairs[place]) > 0).any() and (matrix.pairs[place].diagonal() == 0).all()


def test_measured_pairs_add_up_to_the_divergence_of_both(odd: Callable[..., Any]) -> None:
    network, data, table = found(odd, "measured", ["int3:channel:asym:minmax"])
    first, last = table.units[1].layers[0], table.units[-1].layers[0]
    with torch.no_grad():
        wanted = class_rows(network.model(data))
        for name in (first, last):
            weight = network.model.get_submodule(name).weight
            weight.copy_(rounded(weight, table.options[0].weights).dequantize())
        both = float(kl_rows(wanted, class_rows(network.model(data))).double().mean())
    total = table.scores[1, 0] + table.scores[-1, 0] + table.pairs[0][1, -1]
    assert total == pytest.approx(both, rel=1e-4)


def test_pairs_repair_the_sum_of_single_layers(odd: Callable[..., Any]) -> None:
    """The divergence of quantizing all layers, from singles alone and with pairs; means over seeds."""
    without, with_pairs = [], []
    for seed in range(4):
        network = odd(depth=1, seed=seed)
        data = network.batch(16, seed=1)
        table = measure(network.model, Augmented("measured"), [data], options=["int4:channel:asym:minmax"])
        with torch.no_grad():
            wanted = class_rows(network.model(data))
            for name in table.layers:
                weight = network.model.get_submodule(name).weight
                weight.copy_(rounded(weight, table.options[0].weights).dequantize())
            true = float(kl_rows(wanted, class_rows(network.model(data))).double().mean())
        singles = float(table.scores[:, 0].sum())
        without.append(abs(singles / true - 1))
        with_pairs.append(abs((singles + float(np.triu(table.pairs[0], 1).sum())) / true - 1))
    assert np.mean(with_pairs) < 0.6 * np.mean(without)


def test_an_allocation_by_pairs_keeps_its_budget(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    options = ["int3:channel:asym:minmax", "int4:channel:asym:minmax", "int8:channel:asym:minmax"]
    allocation = allocate(network.model, [network.batch(6)], bits=7.0, by="augmented+pairs=measured", options=options)
    assert allocation.bits <= 7.0 and allocation.solver == "pairwise" and allocation.bound is None


def test_by_default_a_budget_is_spent_with_couplings_in_sight(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    options = ["int3:channel:asym:minmax", "int8:channel:asym:minmax"]
    table = measure(network.model, "augmented", [network.batch(6)], options=options)
    assert table.facts["settings"] == {"pairs": "hvp"} and set(table.pairs) == {0, 1}
    chosen = allocate(table, bits=7.0, by="augmented")
    alone = allocate(table, bits=7.0, solver="milp")
    costs = pair_costs(table.pairs, table.scores.shape)
    problem = problem_of(table, {"size": table.size_for_bits(7.0)})

    def harm(allocation: Any) -> float:
        choice = tuple(table.options.index(allocation.units[unit.name]) for unit in table.units)
        return pair_score(problem, costs, choice)

    assert harm(chosen) <= harm(alone)


@pytest.mark.parametrize("pairs", ["rowsum", "hvp"])
def test_a_search_for_an_accuracy_has_the_order_of_own_costs_and_half_the_couplings(
    pairs: str, odd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither import accuracy

    seen: list[list[int]] = []

    def watched(order: Any, *rest: Any) -> None:
        seen.append(list(order))

    monkeypatch.setattr(accuracy, "bisect", watched)
    network, options = odd(depth=1), ["none", "int6:channel:asym:minmax"]
    measure(network.model, accuracy.Search(f"augmented+pairs={pairs}", 0.9), [network.batch(6)], options=options)
    table = measure(network.model, "augmented", [network.batch(6)], options=options)
    sums = table.scores[:, 1] + table.pairs[1].sum(axis=1) / 2
    if pairs == "hvp":
        assert seen == [np.argsort(sums, kind="stable").tolist()]
    else:  # sums that are not positive count as equal there
        assert [unit for unit in seen[0] if sums[unit] > 0.02 * np.median(sums)] == [
            int(unit) for unit in np.argsort(sums, kind="stable") if sums[unit] > 0.02 * np.median(sums)
        ]
