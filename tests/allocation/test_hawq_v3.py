"""The optima of HAWQ-V3's own ResNet data: its repository's sensitivities, sizes, operations and latencies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dither.allocation.frontier import dynamic
from dither.allocation.knapsack import knapsack
from dither.allocation.lagrangian import lagrangian
from dither.allocation.monotone import monotone
from dither.allocation.problem import Problem, Solver, tied

DATA: dict[str, Any] = json.loads((Path(__file__).parent / "hawq_v3.json").read_text())
TIES = {  # a down-sampling convolution and the one whose output it is added to
    "resnet18": [(4, 6), (9, 11), (14, 16)],
    "resnet50": [(0, 3), (10, 13), (23, 26), (42, 45)],
}


def problem(model: str, resource: str, fraction: float) -> Problem:
    """4 or 8 bits a layer, with a limit between all at 4 and all at 8."""
    data = {key: np.array(values) for key, values in DATA[model].items()}
    costs = {
        "size": np.stack([data["numel"] * 4, data["numel"] * 8], axis=1) / 8,
        "bops": np.stack([data["macs"] / 64, data["macs"] / 16], axis=1),  # of what 32 bits times 32 bits take
        "latency": np.stack([data["latency_int4"], data["latency_int8"]], axis=1),
    }
    scores = data["trace_avg"][:, None] * np.stack([data["dW2_4"], data["dW2_8"]], axis=1)
    low, high = costs[resource].sum(axis=0)
    return Problem(scores, costs, {resource: low + fraction * (high - low)}, data["trace_avg"])


def bits_of(choice: Any, index: Any) -> str:
    return "".join(str(4 + 4 * option) for option in np.array(choice)[index])


@pytest.mark.parametrize(("model", "resource", "fraction", "bits", "score"), DATA["optima"])
def test_the_published_bits_are_found(model: str, resource: str, fraction: float, bits: str, score: float) -> None:
    merged, index = tied(problem(model, resource, fraction), TIES[model])
    solvers: list[Solver] = [knapsack, dynamic]
    for solver in solvers[: 1 if resource == "latency" and model == "resnet50" else 2]:  # sums of latencies never meet
        found = solver(merged)
        assert bits_of(found.choice, index) == bits
        assert found.score == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(("model", "resource", "fraction", "bits", "score"), DATA["optima"])
def test_the_lagrangian_bound_holds(model: str, resource: str, fraction: float, bits: str, score: float) -> None:
    found = lagrangian(tied(problem(model, resource, fraction), TIES[model])[0])
    assert found.bound - 1e-6 <= score <= found.score + 1e-6


@pytest.mark.parametrize(
    ("model", "resource", "fraction", "eights", "score"),
    [
        ("resnet18", "size", 0.25, 14, 0.120608),
        ("resnet18", "size", 0.5, 16, 0.074506),
        ("resnet18", "size", 0.75, 17, 0.045273),
        ("resnet18", "bops", 0.5, 11, 0.214589),
        ("resnet50", "size", 0.5, 42, 0.033436),
        ("resnet50", "bops", 0.5, 29, 0.093427),
    ],
)
def test_hawq_v2_orders_bits_by_trace(model: str, resource: str, fraction: float, eights: int, score: float) -> None:
    found = monotone(problem(model, resource, fraction))
    assert sum(found.choice) == eights
    assert found.score == pytest.approx(score, abs=1e-6)
