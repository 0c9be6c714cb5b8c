"""QERA and its relatives on a small network: who knows more of the inputs leaves less output error."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dither
from dither.methods import QERA, RTN

SCALES = ("exact", "approx", "lqer", "identity")


def output_error(result: dither.Result) -> float:
    return float(sum(row["output_error"] for row in result.report.data["layers"]))


def spread(network: Any) -> Any:
    """Embeddings and norms of very unlike channels, as language models have them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            if "norm" in name or "embed" in name:
                parameter.mul_(torch.exp(1.5 * torch.randn(parameter.shape[-1], generator=generator)))
    return network


def test_exact_is_best_then_the_diagonals_then_no_knowledge_then_no_correction(tiny: Callable[..., Any]) -> None:
    network = spread(tiny("LlamaForCausalLM", num_hidden_layers=1))
    methods = {scale: QERA(scale=scale, rank=2, weights="mxint3:g16") for scale in SCALES}  # type: ignore[arg-type]
    methods["plain"] = RTN(weights="mxint3:g16")  # type: ignore[arg-type, assignment]
    found = {name: dither.quantize(network.model, method, [network.batch(16)]) for name, method in methods.items()}
    errors = {name: output_error(result) for name, result in found.items()}
    assert errors["exact"] < errors["approx"] < errors["identity"] < errors["plain"]
    assert errors["exact"] < errors["lqer"] < errors["identity"]
    for row, other in zip(found["exact"].report.data["layers"], found["approx"].report.data["layers"], strict=True):
        assert row["output_error"] <= other["output_error"] * 1.001
    weight = {scale: sum(row["weight_error"] for row in found[scale].report.data["layers"]) for scale in SCALES}
    assert min(weight, key=lambda scale: weight[scale]) == "identity"


def test_codes_are_those_of_rounding_and_the_factors_are_counted(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    methods = QERA(rank=2, weights="mxint3:g12"), RTN(weights="mxint3:g12")
    layer, plain = (
        dither.quantize(network.model, method.model_copy(update={"skip": ("stem", "*.fc2")}), network.batch(4))
        .model.get_submodule("blocks.0.fc1")
        .packed.qtensor()  # type: ignore[operator, union-attr]
        for method in methods
    )
    assert torch.equal(layer.codes, plain.codes)
    assert layer.nbytes == plain.nbytes + 2 * 2 * (12 + 17)
    assert layer.low_rank is not None
    assert layer.low_rank.rank == 2


def test_compensated_codes_are_a_better_base(tiny: Callable[..., Any]) -> None:
    network = spread(tiny("LlamaForCausalLM", num_hidden_layers=1))
    errors = [
        output_error(
            dither.quantize(network.model, QERA(weights="int3", rank=2, rounding=rounding), [network.batch(16)])
        )
        for rounding in ("columns", "nearest")
    ]
    assert errors[0] < errors[1]


def test_each_scale_is_the_square_of_the_papers_diagonal_or_root() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    gram, magnitude = x.T @ x / 20, x.abs().mean(dim=0)
    found = {scale: QERA(scale=scale).second_moment(gram, magnitude) for scale in SCALES}  # type: ignore[arg-type]
    assert found["identity"] is None
    for scale, diagonal in (("lqer", magnitude), ("approx", x.square().mean(dim=0).sqrt())):
        moment = found[scale]
        assert moment is not None
        torch.testing.assert_close(moment.sqrt(), diagonal)
    assert found["exact"] is gram


def test_a_rank_that_does_not_fit_and_a_grouped_convolution_are_noted() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)).eval()
    result = dither.quantize(model, QERA(weights="int3"), torch.randn(2, 4, 6, 6, generator=generator))
    notes = [row["notes"] for row in result.report.data["layers"]]
    assert notes[0]["scale"] == "identity: grouped convolution"
    assert notes[1] == {"rank": 4.0, "rank_limit": "smaller side of the matrix"}
