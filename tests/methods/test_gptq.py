"""GPTQ: codebooks, and groups whose grids are fitted on the way."""

import pytest
import torch

from dither.calibrate import LayerTask
from dither.formats.qtensor import QTensor
from dither.methods import GPTQ
from dither.statistics.gram import Gram


def layer(seed: int = 0) -> LayerTask:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 32, generator=generator)
    mix = torch.randn(32, 32, generator=generator) * torch.logspace(0, -1, 32)[:, None]
    return LayerTask("fc", weight, None, Gram.of(torch.randn(200, 32, generator=generator) @ mix))


def cost(task: LayerTask, method: GPTQ) -> float:
    assert task.gram is not None
    change = method.solve(task).weight.dequantize(torch.float64) - task.weight
    return float(((change @ task.gram.quantized) * change).sum())


@pytest.mark.parametrize("act_order", [True, False])
def test_groups_fitted_on_the_way_err_less_and_are_stored_with_their_columns(act_order: bool) -> None:
    tasks = [layer(seed) for seed in range(4)]
    static = GPTQ(weights="int2:g8:asym:tight:realzero:minmax", act_order=act_order)  # type: ignore[arg-type]
    dynamic = static.model_copy(update={"static_groups": False})
    assert sum(cost(task, dynamic) for task in tasks) < 0.95 * sum(cost(task, static) for task in tasks)
    stored = dynamic.solve(tasks[0]).weight
    assert stored.layout.regrouped == act_order
    assert torch.equal(QTensor.unpack(stored.pack(), stored.layout).dequantize(), stored.dequantize())


@pytest.mark.parametrize("text", ["nf4:g8", "fp4:channel"])
@pytest.mark.parametrize("static_groups", [True, False])
def test_codebooks_are_swept_too(text: str, static_groups: bool) -> None:
    task = layer()
    method = GPTQ(weights=text, static_groups=static_groups)  # type: ignore[arg-type]
    nearest = GPTQ(weights=text).solve(LayerTask("fc", task.weight, None, None))  # type: ignore[arg-type]
    assert task.gram is not None
    change = nearest.weight.dequantize(torch.float64) - task.weight
    assert cost(task, method) < 0.7 * float(((change @ task.gram.quantized) * change).sum())


@pytest.mark.parametrize("text", ["int2:g8:asym:tight:realzero:minmax", "int3:g8:sym:minmax", "int2:g8:asym:minmax"])
def test_groups_of_least_error_weighed_by_energy_err_less_than_those_of_the_extremes(text: str) -> None:
    tasks = [layer(seed) for seed in range(4)]
    extremes = GPTQ(weights=text, static_groups=False)  # type: ignore[arg-type]
    fitted = extremes.model_copy(update={"range_by": "output"})
    assert sum(cost(task, fitted) for task in tasks) < 0.9 * sum(cost(task, extremes) for task in tasks)


def test_a_format_that_no_line_is_fitted_to_keeps_its_own_search() -> None:
    task = layer()
    for text in ("nf4:g8", "int3:tensor:asym:minmax", "int3:g8:ic:asym:minmax"):
        one, other = (GPTQ(weights=text, range_by=by).solve(task).weight for by in ("spec", "output"))  # type: ignore[arg-type]
        assert torch.equal(one.codes, other.codes)
