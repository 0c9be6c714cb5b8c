"""Allocations by classes: budgets are kept, measures are those of each class, the best of what was evaluated wins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dither.allocation.table import SIZE
from dither.by_classes import RATIOS, Judge, allocate_by_classes
from dither.errors import InputError
from dither.models.losses import class_rows
from dither.provenance import model_sha256
from dither.sensitivities.base import rounded
from dither.sensitivity import measure
from dither.statistics.divergence import kl_rows

OPTIONS = ["int2:channel", "int3:channel", "int4:channel", "int6:channel"]
CLASS = "blocks.*.fc?"


def divergence(network: Any, data: Any, layers: Any) -> float:
    with torch.no_grad():
        wanted = class_rows(network.model(data))
        for name, option in layers.items():
            weight = network.model.get_submodule(name).weight
            weight.copy_(rounded(weight, option.weights).dequantize())
        return float(kl_rows(wanted, class_rows(network.model(data))).double().mean())


def test_mixdq_takes_the_split_that_moves_predictions_least(odd: Callable[..., Any], tmp_path: Path) -> None:
    network = odd(depth=2)
    data, before = network.batch(32, seed=1), model_sha256(network.model.state_dict().items())
    how: dict[str, Any] = {"options": OPTIONS, "scores": tmp_path}
    table, found = allocate_by_classes(network.model, [data], "mixdq", {CLASS: "fisher"}, bits=8.0, **how)
    assert model_sha256(network.model.state_dict().items()) == before
    own = {by: measure(network.model, by, [data], options=OPTIONS).scores for by in ("fisher", "kl")}
    for row, unit in enumerate(table.units):
        by = "fisher" if unit.layers[0].endswith(("fc1", "fc2")) else "kl"
        np.testing.assert_array_equal(table.scores[row], own[by][row])
    splits = found.facts["splits"]
    assert len(splits) + len(found.facts["refused"]) == len(RATIOS)
    assert [one["kl"] for one in splits] == sorted(one["kl"] for one in splits)
    assert len({one["kl"] for one in splits}) > 1
    assert found.achieved[SIZE] <= found.requested[SIZE]
    assert found.facts["classes"]["blocks.0.fc1"] == CLASS and found.facts["classes"]["stem"] == "the rest"
    assert divergence(network, data, found.layers) == pytest.approx(splits[0]["kl"], rel=1e-4)


def test_vidit_gives_budgets_by_divergence_and_the_largest_format_by_rank(odd: Callable[..., Any]) -> None:
    network = odd(depth=2)
    data = network.batch(32, seed=1)
    classes = {CLASS: "fisher", "blocks.*.qkv,blocks.*.proj": "kl"}
    table, found = allocate_by_classes(network.model, [data], "vidit", classes, bits=8.0, options=OPTIONS)
    shares, seen = found.facts["bits_of_classes"], found.facts["divergence_of_classes"]
    assert len(shares) == len(seen) == 3
    assert found.achieved[SIZE] <= found.requested[SIZE]
    assert {str(one).split(":")[0] for one in found.layers.values()} <= {"int2", "int6"}
    rows = [row for row, unit in enumerate(table.units) if found.facts["classes"][unit.name] == CLASS]
    assert len(rows) == 4
    whole = {name: table.options[0] for row in rows for name in table.units[row].layers}
    assert divergence(network, data, whole) == pytest.approx(seen[0], rel=1e-4)


def test_a_choice_may_leave_units_as_they_are(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    data = network.batch(8)
    found = measure(network.model, Judge(((-1,) * 6, (-1, 0, -1, -1, -1, -1))), [data], options=OPTIONS).facts["kl"]
    alone = measure(network.model, "kl", [data], options=OPTIONS)
    assert found == [0.0, pytest.approx(alone.scores[1, 0])]


def test_classes_that_make_no_sense_are_refused(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)

    def refused(way: str, classes: dict[str, str], **how: Any) -> str:
        with pytest.raises(InputError) as caught:
            allocate_by_classes(network.model, [network.batch(4)], way, classes, bits=8.0, options=OPTIONS, **how)
        return str(caught.value)

    assert "mixdq with one class" in refused("mixdq", {"*.fc1": "error", "*.fc2": "error"})
    assert "blocks.0.fc1 is in two classes" in refused("vidit", {"*.fc1": "error", "*.fc?": "error"})
    assert "no layer is left for the rest" in refused("mixdq", {"*": "error"}, rest="error")
    assert "matches no layer" in refused("mixdq", {"*.fc7": "error"}, rest="error")
    tied = refused("mixdq", {"*.fc1": "error"}, rest="error", ties=["*.fc1,*.fc2"])
    assert "share a format, but are in 2 classes" in tied
