"""AdaDim: outliers of an input channel are left to their own groups, and the better axis is the one that is stored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.calibrate import LayerTask
from dither.errors import ShapeError
from dither.formats.spec import QuantSpec
from dither.methods import GPTQ, AdaDim
from dither.methods.adadim import nearest_codes, own_errors
from dither.statistics.gram import Gram


def layer(outlier: str, seed: int = 0, rows: int = 24, columns: int = 32) -> LayerTask:
    """Weights whose input channels, or outputs, lie apart from one another."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    shape = (1, columns) if outlier == "input" else (rows, 1)
    weight += 4 * torch.randn(shape, generator=generator)
    x = torch.randn(200, columns, generator=generator) @ (
        torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    )
    return LayerTask("fc", weight, None, Gram.of(x))


def cost(task: LayerTask, method: AdaDim | GPTQ) -> float:
    assert task.gram is not None
    change = method.solve(task).weight.dequantize(torch.float64) - task.weight
    return float(((change @ task.gram.quantized) * change).sum())


@pytest.mark.parametrize(("outlier", "axis"), [("input", "outputs"), ("output", "inputs")])
@pytest.mark.parametrize("rounding", ["nearest", "columns"])
def test_groups_run_along_the_axis_that_isolates_outliers(outlier: str, axis: str, rounding: str) -> None:
    task = layer(outlier)
    method = AdaDim(weights="int3:g8:realzero", rounding=rounding, judge="layer")  # type: ignore[arg-type]
    solution = method.solve(task)
    assert solution.weight.spec.group_along == axis
    assert solution.notes["axis"] == axis
    assert solution.notes["gain"] > 1.5
    assert str(solution.weight.spec).startswith("int3:g8" + (":ic" if axis == "outputs" else ":asym"))


def test_the_axis_is_that_of_the_lower_error_of_the_output_and_columns_beat_nearest() -> None:
    for seed in range(3):
        task = layer("input", seed)
        candidates = nearest_codes(task.weight, QuantSpec.parse("int3:g8:asym:tight:realzero"))
        errors = own_errors(task, candidates)
        nearest = cost(task, AdaDim(weights="int3:g8:realzero", rounding="nearest", judge="layer"))  # type: ignore[arg-type]
        columns = cost(task, AdaDim(weights="int3:g8:realzero", judge="layer"))  # type: ignore[arg-type]
        gptq = cost(task, GPTQ(weights="int3:g8:asym:tight:realzero:minmax"))  # type: ignore[arg-type]
        assert nearest == pytest.approx(min(errors.values()), rel=1e-6)
        assert columns < 0.8 * nearest
        assert columns < 0.7 * gptq


def test_a_group_that_divides_one_axis_leaves_no_choice_and_one_that_divides_none_is_refused() -> None:
    task = layer("input", rows=12, columns=32)
    assert AdaDim(weights="int3:g8:realzero", judge="layer").solve(task).notes["axis"] == "inputs: no choice"  # type: ignore[arg-type]
    assert AdaDim(weights="int3:g3", judge="layer").solve(task).notes["axis"] == "outputs: no choice"  # type: ignore[arg-type]
    assert AdaDim(weights="int3", judge="layer").solve(task).notes["axis"] == "inputs: no choice"  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="group size 5"):
        AdaDim(weights="int3:g5").solve(task)  # type: ignore[arg-type]


def test_errors_from_outside_decide() -> None:
    task = layer("input")
    method = AdaDim(weights="int3:g8:realzero", rounding="nearest")  # type: ignore[arg-type]
    assert method.solve(task).notes["axis"] == "outputs"
    forced = method.solve(task, {"fc": {"inputs": 1.0, "outputs": 3.0}})
    assert forced.notes == {"axis": "inputs", "gain": 3.0}


class Heads(nn.Module):
    """Two layers that read the same input; what the second says counts for little in the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 0.01 * torch.tanh(self.second(x))


class Stack(nn.Module):
    """A list of blocks that hold the heads, between a first and a last layer."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.heads = nn.LayerNorm(16), Heads()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.heads(self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Stack.Layer(), Stack.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x)
        return x


def test_layers_that_share_an_input_are_judged_by_the_module_that_holds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    model, x = Stack(), torch.randn(8, 6, 16, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    notes = {}
    for judge in ("module", "layer"):
        method = AdaDim(weights="int3:g4", rounding="nearest", judge=judge)  # type: ignore[arg-type]
        result = dither.quantize(model, method, [x])
        notes[judge] = {row["name"]: row["notes"] for row in result.report.data["layers"]}
    assert list(notes["module"]) == [f"layers.{k}.heads.{part}" for k in (0, 1) for part in ("first", "second")]
    heads, norm = model.layers[0].heads, model.layers[0].norm  # type: ignore[union-attr]
    seen = norm(x)  # type: ignore[operator]
    true = heads(seen)  # type: ignore[operator]
    errors = {}
    codes = nearest_codes(heads.second.weight.detach(), QuantSpec.parse("int3:g4:asym:tight:clampzero"))  # type: ignore[union-attr]
    for axis, stored in codes.items():
        changed = heads.first(seen) + 0.01 * torch.tanh(seen @ stored.dequantize().T)  # type: ignore[operator, union-attr]
        errors[axis] = float((changed - true).detach().square().sum())
    best = min(errors, key=lambda axis: errors[axis])
    note = notes["module"]["layers.0.heads.second"]
    assert note["axis"] == best
    assert note["gain"] == pytest.approx(max(errors.values()) / min(errors.values()), rel=1e-3)
    assert notes["layer"]["layers.0.heads.second"]["gain"] != pytest.approx(note["gain"], rel=1e-3)


def test_a_language_model_keeps_its_weights_while_it_is_judged(tiny: Callable[..., Any]) -> None:
    network = tiny(num_hidden_layers=1)
    before = {key: value.clone() for key, value in network.model.state_dict().items()}
    method = AdaDim(weights="int4:g4", rounding="nearest")  # type: ignore[arg-type]
    result = dither.quantize(network.model, method, network.batch(4))
    assert all(torch.equal(before[key], value) for key, value in network.model.state_dict().items())
    again = dither.quantize(network.model, method, network.batch(4))
    rows = [[row["notes"] for row in one.report.data["layers"]] for one in (result, again)]
    assert rows[0] == rows[1]
    assert any("gain" in note for note in rows[0])
