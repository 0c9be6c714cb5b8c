"""OAC: its Hessian by the book, behind which prefix it is taken, and that the loss minds less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.calibrate import LayerTask
from dither.errors import InputError
from dither.methods import GPTQ, OAC, RTN
from dither.models.gradients import Gradients
from dither.models.network import open_network
from dither.recipe import build_method
from dither.solvers.binary import BinarySettings, round_binary
from dither.statistics.sensitivity import Sensitivity

TWO_BITS = "int2:g16:asym:tight:realzero:minmax"


def hessian(model: nn.Module, batches: list[dict[str, Tensor]], name: str) -> Tensor:
    """Mean over sequences and sum over rows of each row's outer product, in units of the mean diagonal."""
    weight, total, count = model.get_submodule(name).weight, 0.0, 0
    for ids in torch.cat([batch["input_ids"] for batch in batches]):
        with torch.enable_grad():
            weight.requires_grad_(True)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, ids[1:]), weight)
            weight.requires_grad_(False)
        total, count = total + sum(torch.outer(row, row).double() for row in gradient), count + 1
    mean = torch.as_tensor(total) / count
    return mean / mean.diagonal().mean()


def test_the_hessian_is_the_mean_over_sequences_of_the_rows_outer_products(trained: Any) -> None:
    name = "model.layers.0.self_attn.o_proj"
    gradients = Gradients(trained.model, open_network(trained.model).run, trained.calibration[:2])
    found = OAC(gradients="once").sensitivities([name], gradients)[name].hessian
    assert found is not None
    true = hessian(trained.model, trained.calibration[:2], name)
    torch.testing.assert_close(found.double(), true, rtol=1e-3, atol=1e-5)


def test_each_blocks_gradients_are_taken_behind_the_quantized_blocks_before_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny("LlamaForCausalLM")
    batches = [network.batch(3), network.batch(2, seed=1)]
    seen: dict[str, Tensor] = {}

    def record(self: OAC, task: LayerTask) -> Any:
        assert task.sensitivity is not None and task.sensitivity.hessian is not None
        seen[task.name] = task.sensitivity.hessian
        return solve(self, task)

    solve = OAC.solve
    monkeypatch.setattr(OAC, "solve", record)
    method = OAC(solver="gptq", weights="int2:g16")  # type: ignore[arg-type]
    result = dither.quantize(network.model, method, batches)
    first, second = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    torch.testing.assert_close(seen[first].double(), hessian(network.model, batches, first), rtol=1e-3, atol=1e-4)
    original = hessian(network.model, batches, second)
    network.model.model.layers[0] = result.model.model.layers[0]
    torch.testing.assert_close(seen[second].double(), hessian(network.model, batches, second), rtol=1e-3, atol=1e-4)
    assert float((seen[second] - original).norm() / original.norm()) > 0.05


@pytest.mark.parametrize("gradients", ["block", "once"])
def test_a_resumed_run_gives_the_same_bytes(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients: str
) -> None:
    monkeypatch.setattr("dither.report.html.write_html", lambda data, path: path.write_text("a report"))
    network = tiny("LlamaForCausalLM")
    method = OAC(weights="int3:g16", gradients=gradients)  # type: ignore[arg-type]

    class StopError(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if name == "model.layers.0":
            raise StopError

    options: dict[str, Any] = {"method": method, "calibration": [network.batch(4)]}
    dither.quantize(network.model, output=tmp_path / "whole", **options)
    with pytest.raises(StopError):
        dither.quantize(network.model, output=tmp_path / "out", progress=stop, **options)
    dither.quantize(network.model, output=tmp_path / "out", resume=True, spill_budget=0, **options)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "out")]
    assert files[0] == files[1]


def error(weight: Tensor, stored: Tensor, moment: Tensor) -> float:
    change = stored.double() - weight
    return float(((change @ moment) * change).sum())


def test_it_errs_least_in_its_own_measure_and_rounding_to_nearest_most() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    mixed = torch.randn(48, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    moment = (mixed.T @ mixed).double()
    task = LayerTask("fc", weight, None, None, sensitivity=Sensitivity(hessian=moment.float()))
    found = [
        RTN(weights=TWO_BITS).solve(task),  # type: ignore[arg-type]
        OAC(weights=TWO_BITS, solver="gptq", damping=0.01).solve(task),  # type: ignore[arg-type]
        OAC(weights="int2:g16", solver="spqr", damping=0.01).solve(task),  # type: ignore[arg-type]
    ]
    errors = [error(weight, one.weight.dequantize(), moment) for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.5 * errors[0]


def test_binary_weights_are_billms_and_only_its() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    mixed = torch.randn(48, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    task = LayerTask("fc", weight, None, None, sensitivity=Sensitivity(hessian=mixed.T @ mixed))
    method = build_method("oac-billm", {"weights": "nuq2:g16:dual"})
    stored = method.solve(task).weight  # type: ignore[attr-defined]
    settings = BinarySettings()
    expected, _ = round_binary(weight.double(), (mixed.T @ mixed).double(), method.weights, 0.01, False, settings)
    assert torch.equal(stored.codes, expected.codes)
    with pytest.raises(InputError, match=r"nuq2:g16:dual needs solver=billm"):
        build_method("oac", {"weights": "nuq2:g16:dual"})


def test_a_layer_whose_gradients_have_not_been_taken_is_refused() -> None:
    with pytest.raises(InputError, match="fc: OAC rounds by gradients, which have not been taken"):
        OAC().solve(LayerTask("fc", torch.ones(4, 128), None, None))


def test_a_trained_model_loses_less_at_two_bits_than_by_gptq_and_by_rounding(trained: Any) -> None:
    methods = [RTN(weights=TWO_BITS), GPTQ(weights=TWO_BITS), OAC(weights=TWO_BITS, solver="gptq")]  # type: ignore[arg-type]
    losses = [trained.loss(dither.quantize(trained.model, one, trained.calibration).model) for one in methods]
    assert losses == sorted(losses, reverse=True)
