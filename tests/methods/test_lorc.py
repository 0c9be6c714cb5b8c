"""LoRC on a small network: what eight-bit factors of rank 4 give back at 2 bits."""

from collections.abc import Callable
from typing import Any

import pytest

import dither
from dither.methods import GPTQ, RTN, LoRC


@pytest.mark.parametrize("rounding", ["columns", "nearest"])
def test_lorc_adds_eight_bit_factors_that_bring_the_weight_closer(tiny: Callable[..., Any], rounding: Any) -> None:
    network = tiny("LlamaForCausalLM", num_hidden_layers=1)
    base = GPTQ if rounding == "columns" else RTN
    plain = dither.quantize(network.model, base(weights="int2:minmax"), [network.batch(16)])
    better = dither.quantize(network.model, LoRC(weights="int2", rank=4, rounding=rounding), [network.batch(16)])
    assert better.report.data["layers"][0]["nbytes"] == plain.report.data["layers"][0]["nbytes"] + 4 * (64 + 4)
    errors = [sum(row["weight_error"] for row in result.report.data["layers"]) for result in (better, plain)]
    assert errors[0] < 0.8 * errors[1]
