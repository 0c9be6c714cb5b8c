"""SpQR: its settings, its bits, and that outliers and small groups pay."""

import pytest
import torch
from torch import Tensor

from dither.calibrate import LayerTask
from dither.methods import GPTQ, SpQR
from dither.methods.base import Method
from dither.recipe import build_method
from dither.statistics.gram import Gram


def layer(seed: int, rows: int = 64, columns: int = 64, ones: bool = False) -> LayerTask:
    """A layer whose weights have a few outliers and whose inputs correlate."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(rows, columns) / columns**0.5
    weight[draw(rows, columns) > 2.6] *= 8
    x = draw(4 * columns, columns) @ (draw(columns, columns) * torch.logspace(0, -1.5, columns)[:, None])
    bias = draw(rows) if ones else None
    return LayerTask("fc", weight, bias, Gram.of(x, ones=ones))


def error(method: Method, task: LayerTask) -> float:
    assert task.gram is not None
    solution = method.solve(task)  # type: ignore[attr-defined]
    stored = solution.weight.dequantize(torch.float64)
    k = task.columns
    change, gram = stored - task.weight, task.gram.quantized[:k, :k]
    return float(((change @ gram) * change).sum() / ((task.weight.double() @ gram) * task.weight).sum())


def test_the_operating_points_are_those_of_the_released_code_and_of_the_paper() -> None:
    plain, small = build_method("spqr", {}), build_method("spqr-3bit", {})
    assert isinstance(plain, SpQR) and isinstance(small, SpQR)
    assert str(plain.weights) == "int4:g16:asym:tight:realzero:s3.16"
    assert (plain.damping, plain.threshold, plain.act_order, plain.leave_one_out) == (1.0, 0.2, True, True)
    assert str(small.weights) == "int3:g8:asym:tight:realzero:s3.64"
    assert str(SpQR(weights="int2:g16").weights) == "int2:g16:asym:tight:realzero"  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "expected"), [("spqr", 4 + 6 / 16 + 64 / 256), ("spqr-3bit", 3 + 6 / 8 + 64 / 512)])
def test_without_outliers_the_bits_are_the_papers_and_the_order_of_the_columns(name: str, expected: float) -> None:
    task = layer(0, 128, 128)
    method = build_method(name, {"threshold": 1e9})
    stored = method.solve(task).weight  # type: ignore[attr-defined]
    order, row_offsets = 8 * 128 / 128**2, 32 * 129 / 128**2
    assert stored.bits_per_weight == pytest.approx(expected + order + row_offsets)


def test_each_outlier_costs_32_bits() -> None:
    task = layer(0)
    none, some = (SpQR(threshold=tau).solve(task) for tau in (1e9, 0.05))
    assert some.weight.sparse is not None and some.weight.sparse.count > 10
    assert 8 * (some.weight.nbytes - none.weight.nbytes) == 32 * some.weight.sparse.count
    assert some.notes["outliers"] == some.weight.sparse.count / task.weight.numel()


def test_it_beats_gptq_with_groups_of_like_size_and_more_outliers_beat_fewer() -> None:
    tasks = [layer(seed) for seed in range(4)]
    gptq = GPTQ(weights="int3:g16:asym:tight:realzero:minmax")
    found = [gptq, *(SpQR(weights="int3:g16:s3.16", threshold=tau, damping=0.1) for tau in (0.5, 0.2, 0.1))]
    errors = [sum(error(method, task) for task in tasks) for method in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]


def test_a_bias_is_kept_and_a_layer_without_gram_is_rounded_to_nearest() -> None:
    task = layer(1, ones=True)
    solution = SpQR().solve(task)
    assert solution.bias is task.bias
    bare = SpQR().solve(LayerTask("conv", task.weight, None, None))
    assert bare.notes == {"rounding": "nearest: grouped convolution"}
    assert bare.weight.sparse is None
