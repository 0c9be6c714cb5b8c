"""BAQ: formats are read as means, blocks share bits, and what was saved is what runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
from dither.calibrate import LayerTask
from dither.errors import InputError
from dither.methods import BAQ, GPTQ
from dither.nn.linear import QuantizedLinear
from dither.recipe import build_method
from dither.statistics.gram import Gram


def layer(seed: int = 0, spread: float = 1.0, name: str = "fc", rows: int = 24) -> LayerTask:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32, generator=generator)
    scales = torch.exp(spread * torch.randn(32, generator=generator))
    return LayerTask(name, weight, None, Gram.of(torch.randn(200, 32, generator=generator) * scales))


def cost(task: LayerTask, stored: Any) -> float:
    assert task.gram is not None
    change = stored.dequantize(torch.float64) - task.weight
    return float(((change @ task.gram.quantized) * change).sum())


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("int3", "mix3:channel:asym:realzero:mse"),
        ("int3:g8:sym:minmax", "mix3:g8"),
        ("int4:percentile", "mix4:channel:asym:realzero:mse"),
        ("mix2:g8", "mix2:g8:asym:realzero:mse"),
    ],
)
def test_integer_formats_are_means(text: str, read: str) -> None:
    assert str(build_method("baq", {"weights": text}).weights) == read


@pytest.mark.parametrize("text", ["nf4", "int3:dual", "int4:g8:ic", "int4:pow2"])
def test_formats_without_columns_of_different_widths_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="method 'baq', weights"):
        build_method("baq", {"weights": text})


def test_it_errs_less_than_gptq_where_inputs_differ_in_scale_and_counts_its_bytes() -> None:
    tasks = [layer(seed) for seed in range(3)]
    mine = [BAQ(weights="int3").solve(task, {}) for task in tasks]  # type: ignore[arg-type]
    text = "int3:channel:asym:realzero:minmax"
    plain = [GPTQ(weights=text, range_by="output").solve(task) for task in tasks]  # type: ignore[arg-type]
    errors = [sum(cost(t, s.weight) for t, s in zip(tasks, found, strict=True)) for found in (mine, plain)]
    assert errors[0] < 0.6 * errors[1]
    for solution in mine:
        assert solution.weight.nbytes == sum(part.nbytes for part in solution.weight.pack().values())
        widths = solution.notes["columns_of_bits"]
        assert sum(int(bits) * count for bits, count in widths.items()) == 3 * 32


def test_blocks_share_bits_by_relative_error_and_keep_their_mean() -> None:
    loud, quiet = layer(0, spread=0.0, name="loud"), layer(1, spread=2.0, name="quiet", rows=48)
    method = BAQ(weights="int3", scope="block", losses="law")  # type: ignore[arg-type]
    rates = method.shared([loud, quiet])
    assert (24 * rates["loud"] + 48 * rates["quiet"]) / 72 == pytest.approx(3)
    assert rates["loud"] > rates["quiet"] + 0.3, "columns that differ make up for a lower mean"

    def relative(rate: dict[str, float]) -> float:
        total = 0.0
        for task in (loud, quiet):
            assert task.gram is not None
            energy = float(((task.weight.double() @ task.gram.quantized) * task.weight).sum())
            total += cost(task, method.solve(task, rate).weight) / energy
        return total

    assert relative(rates) < relative({})


def test_an_average_may_be_a_fraction_and_overrides_keep_theirs() -> None:
    method = build_method("baq", {"weights": "int3", "average": 2.5, "overrides": {"b": "int5"}})
    assert isinstance(method, BAQ)
    assert (method.rate("a"), method.rate("b")) == (2.5, 5)
    assert method.solve(layer(name="a"), {}).notes["average"] == 2.5


def test_what_was_saved_computes_the_same(odd: Callable[..., Any], tmp_path: Path) -> None:
    network = odd(depth=1)
    fields = {"weights": "int3", "scope": "block", "activations": "int8:minmax"}
    result = dither.quantize(network.model, build_method("baq", fields), network.batch(6), output=tmp_path / "out")
    loaded = dither.load(tmp_path / "out", into=odd(depth=1, seed=5).model)
    assert torch.equal(network.logits(network.batch(4), loaded), network.logits(network.batch(4), result.model))
    layers = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    assert any(len([count for count in one.packed.layout.widths or () if count]) > 1 for one in layers)
