"""Allocation to an accuracy: what was asked for is met by real evaluations, and the model stays as it was."""

from collections.abc import Callable
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
import torch

from dither.accuracy import Search, allocate_to_accuracy
from dither.errors import InputError
from dither.provenance import model_sha256
from dither.sensitivities.base import rounded
from dither.sensitivity import measure

OPTIONS = ["none", "int4:channel:asym:minmax", "int2:channel:asym:minmax"]


def agreement(network: Any, data: Any, table: Any, allocation: Any) -> float:
    with torch.no_grad():
        wanted = network.model(data).argmax(dim=-1)
        for name, option in allocation.layers.items():
            weight = network.model.get_submodule(name).weight
            if option.weights is not None:
                weight.copy_(rounded(weight, option.weights).dequantize())
        return float((network.model(data).argmax(dim=-1) == wanted).float().mean())


@pytest.mark.parametrize("search", ["bisection", "greedy"])
def test_the_target_is_met_in_few_evaluations(search: Any, odd: Callable[..., Any]) -> None:
    network, accuracy = odd(depth=2), 0.95
    data = network.batch(200, seed=1)
    before = model_sha256(network.model.state_dict().items())
    table, allocation = allocate_to_accuracy(
        network.model, [data], accuracy, by="error", search=search, options=OPTIONS
    )
    assert model_sha256(network.model.state_dict().items()) == before
    if search == "bisection":
        assert len(table.facts["evaluations"]) <= 2 * ceil(log2(len(table.units) + 1))
    assert allocation.requested == {"accuracy": accuracy} and allocation.bits < 20
    assert agreement(network, data, table, allocation) >= accuracy


def test_a_lower_target_never_takes_more_and_evaluations_are_kept(odd: Callable[..., Any], tmp_path: Path) -> None:
    network = odd(depth=1)
    data, bits = [network.batch(100, seed=1)], []
    for accuracy in (1.0, 0.95, 0.3):
        bits.append(allocate_to_accuracy(network.model, data, accuracy, by="kl", options=OPTIONS)[1].bits)
    assert bits[0] >= bits[1] >= bits[2]
    assert bits[2] < 5
    how = {"by": "kl", "options": OPTIONS, "scores": tmp_path}
    one, two = (allocate_to_accuracy(network.model, data, 0.95, **how) for _ in range(2))  # type: ignore[arg-type]
    assert one[1] == two[1] and len(list(tmp_path.iterdir())) == 1


def test_the_cheapest_by_another_cost_may_be_another(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    _, allocation = allocate_to_accuracy(
        network.model, [network.batch(50)], 0.9, by="error", cost="bops", options=OPTIONS
    )
    assert set(allocation.requested) == {"accuracy"} and "bops" in allocation.achieved


def test_wrong_requests_are_refused(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    with pytest.raises(InputError, match=r"share of predictions such as 0.99, got 99"):
        allocate_to_accuracy(network.model, [network.batch(4)], 99.0)
    with pytest.raises(InputError, match="full precision among the options"):
        measure(network.model, Search("error", 0.9), [network.batch(4)], options=["int4", "int8"])
    with pytest.raises(InputError, match="no cost 'speed'"):
        allocate_to_accuracy(network.model, [network.batch(4)], 0.9, by="error", cost="speed", options=OPTIONS)
