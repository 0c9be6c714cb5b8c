"""The coverage report: every parameter in one row, every row with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import dither
from dither.models.coverage import coverage


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "ConvNextForImageClassification", "AlbertForSequenceClassification"]
)
def test_every_parameter_is_counted_once_and_every_row_has_a_reason(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    rows = dither.quantize(network.model, "rtn", [network.batch(2)]).report.data["coverage"]
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in network.model.parameters())
    assert len({row["name"] for row in rows}) == len(rows)
    assert all(row["reason"] and row["status"] in ("quantized", "kept") for row in rows)
    assert not [row for row in rows if row["reason"] == "not reached by the walk"]


class Own(nn.Linear):
    """Computes in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_reasons_are_those_given_or_follow_from_the_class() -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(2),
            "table": nn.Embedding(2, 2),
            "own": Own(2, 2),
            "fc": nn.Linear(2, 2),
            "act": nn.PReLU(),
        }
    )
    reasons = {row["name"]: row["reason"] for row in coverage(model, {"fc": "skipped by 'fc'"}, {"norm": "folded"})}
    assert reasons == {
        "norm": "folded",
        "table": "embedding stays in full precision",
        "own": "Own overrides the forward pass of its base class",
        "fc": "skipped by 'fc'",
        "act": "PReLU is neither Linear nor Conv2d nor Conv1D",
    }
