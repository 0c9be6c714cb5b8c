"""The coverage report: every parameter in one row, every row with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.conftest import randomize
from torch import Tensor, nn

import dither
from dither.models.coverage import coverage
from dither.nn.activation import ActivationQuantizer
from dither.recipe import build_method


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
        "act": "PReLU is neither Linear nor Conv2d nor transformers' Conv1D",
    }


class Encoder(nn.Module):
    """torch's own transformer, which reads its weights without calling layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_attention_of_torch_is_listed_with_all_its_parameters_and_why_it_is_kept() -> None:
    model = randomize(Encoder())
    batch = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rows = {row["name"]: row for row in dither.quantize(model, "rtn", [batch]).report.data["coverage"]}
    assert sum(row["parameters"] for row in rows.values()) == sum(p.numel() for p in model.parameters())
    owner, last = rows["layers.0.self_attn"], rows["layers.0.self_attn.out_proj"]
    assert (owner["status"], owner["parameters"]) == ("kept", 3 * 16 * 16 + 3 * 16)
    assert owner["reason"] == "MultiheadAttention multiplies by its weights in one call of torch, not through layers"
    assert (last["status"], last["reason"]) == ("kept", "MultiheadAttention reads its weight without calling it")


def test_inputs_in_torch_s_encoder_are_quantized_though_it_has_a_call_that_reads_weights_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = randomize(Encoder())
    batch = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    quantized = dither.quantize(model, build_method("rtn", {"activations": "int4"}), [batch]).network.model
    called: list[int] = []
    forward = ActivationQuantizer.forward

    def spy(self: ActivationQuantizer, x: Tensor) -> Tensor:  # a hook would keep torch from its call
        called.append(x.shape[-1])
        return forward(self, x)

    monkeypatch.setattr(ActivationQuantizer, "forward", spy)
    with torch.no_grad():
        quantized(batch)
    assert called == [16, 32, 16, 32]


def test_layers_with_outliers_are_one_kind_whatever_their_number(tiny: Callable[..., Any]) -> None:
    network = tiny()
    result = dither.quantize(network.model, "squeezellm", [network.batch(4)])
    rows = [row for row in result.report.data["coverage"] if row["status"] == "quantized"]
    counts = {m.packed.layout.outliers for m in result.model.modules() if hasattr(m, "packed")}
    assert len(counts - {None}) > 1
    plain = "weights nuq4:channel"  # a small layer may have none
    assert {row["reason"] for row in rows} <= {plain, f"{plain}; outliers kept apart"}
