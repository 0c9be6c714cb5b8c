"""SqueezeLLM: which weights it keeps, what its levels cost, and that the loss minds less than after plain rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.calibrate import LayerTask
from dither.formats.spec import QuantSpec
from dither.methods import RTN, SqueezeLLM
from dither.models.gradients import Gradients
from dither.models.network import open_network
from dither.solvers.levels import fit_levels
from dither.statistics.sensitivity import Sensitivity


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def asked(trained: Any, method: SqueezeLLM) -> dict[str, Sensitivity]:
    gradients = Gradients(trained.model, open_network(trained.model).run, trained.calibration)
    return dict(method.sensitivities(layers_of(trained.model), gradients))


def fisher(trained: Any, name: str, samples: int) -> Tensor:
    """Plain autograd, sequence by sequence."""
    weight, total = trained.model.get_submodule(name).weight, 0.0
    for ids in torch.cat([batch["input_ids"] for batch in trained.calibration])[:samples]:
        with torch.enable_grad():
            weight.requires_grad_(True)
            logits = trained.model(input_ids=ids[None]).logits[0, :-1]
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, ids[1:]), weight)
            weight.requires_grad_(False)
        total = total + gradient.square()
    return torch.as_tensor(total)


def test_the_fisher_information_is_the_sum_over_sequences_of_squared_gradients(trained: Any) -> None:
    found = asked(trained, SqueezeLLM(samples=5))
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"):
        torch.testing.assert_close(found[name].fisher, fisher(trained, name, 5), rtol=1e-4, atol=1e-12)


def test_the_most_sensitive_and_the_largest_weights_are_kept_by_one_ratio_for_the_model(trained: Any) -> None:
    method = SqueezeLLM(sensitive=0.01, outliers=0.02)
    found = asked(trained, method)
    ratios = []
    for name, part in found.items():
        weight, kept = trained.model.get_submodule(name).weight, part.kept
        assert part.fisher is not None and kept is not None
        top = part.fisher.flatten().argsort(descending=True)[: round(0.01 * weight.numel())]
        assert bool(kept.flatten()[top].all())
        by_size = kept.flatten().clone()
        by_size[top] = False
        if bool(by_size.any()):
            first, third = (float(weight.flatten().quantile(q)) for q in (0.25, 0.75))
            least, most = weight.abs().flatten()[by_size].min(), weight.abs()[~kept].max()
            assert float(most) < float(least)
            reach = max(-first, third)  # of a distribution around zero the farther quartile decides
            ratios.append(tuple((float(x) - reach) / (third - first) for x in (most, least)))
    assert len(ratios) > 4
    assert max(low for low, _ in ratios) <= min(high for _, high in ratios) + 0.02
    total = sum(int(part.kept.sum()) for part in found.values() if part.kept is not None)
    assert 0.02 < total / sum(part.kept.numel() for part in found.values() if part.kept is not None) <= 0.03


def test_shares_of_zero_leave_only_the_dense_part(trained: Any) -> None:
    found = asked(trained, SqueezeLLM(sensitive=0, outliers=0))
    assert not any(bool(part.kept.any()) for part in found.values() if part.kept is not None)


def task(rows: int = 24, columns: int = 64, seed: int = 0) -> LayerTask:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weights = torch.rand(rows, columns, generator=generator) ** 6 * 1e-9
    kept = torch.rand(rows, columns, generator=generator) < 0.02
    return LayerTask("fc", weight, None, None, sensitivity=Sensitivity(fisher=weights, kept=kept))


def test_kept_weights_come_back_in_half_precision_and_pull_no_level() -> None:
    one = task()
    assert one.sensitivity is not None and one.sensitivity.kept is not None
    kept = one.sensitivity.kept
    one.weight[kept] *= 50
    solution = SqueezeLLM(weights="nuq3").solve(one)  # type: ignore[arg-type]
    stored = solution.weight.dequantize()
    torch.testing.assert_close(stored[kept], one.weight[kept], rtol=1e-3, atol=1e-3)
    assert float(solution.weight.grid.decode(solution.weight.codes.float()).abs().max()) < 6
    assert solution.notes["outliers"] == float(kept.double().mean())


def test_the_weighted_error_is_less_than_that_of_plain_k_means_and_of_even_steps() -> None:
    one = task()
    assert one.sensitivity is not None and one.sensitivity.fisher is not None
    weights = one.sensitivity.fisher
    dense = LayerTask("fc", one.weight, None, None, sensitivity=Sensitivity(fisher=weights))
    plain = LayerTask("fc", one.weight, None, None)
    method = SqueezeLLM(weights="nuq3")  # type: ignore[arg-type]
    found = [method.solve(dense), method.solve(plain), RTN(weights="int3:asym:mse").solve(plain)]  # type: ignore[arg-type]
    errors = [float((weights * (s.weight.dequantize() - one.weight).square()).sum()) for s in found]
    assert errors[0] < 0.6 * errors[1] < 0.6 * errors[2]
    assert found[1].notes == {"weighted": "no"}


def test_a_row_whose_gradients_are_all_zero_is_fitted_without_weights() -> None:
    one = task()
    assert one.sensitivity is not None and one.sensitivity.fisher is not None and one.sensitivity.kept is not None
    one.sensitivity.fisher[3] = 0.0
    one.weight[3][one.sensitivity.kept[3]] = 90.0
    method = SqueezeLLM(weights="nuq3")  # type: ignore[arg-type]
    grid = method.solve(one).weight.grid
    expected = fit_levels(one.weight[3:4], QuantSpec.parse("nuq3"), (~one.sensitivity.kept[3:4]).float())
    assert torch.equal(grid.levels[3], expected.levels[0])  # type: ignore[union-attr]


def test_every_byte_of_codes_levels_and_kept_weights_counts() -> None:
    rows, columns, count = 24, 64, 0
    for bits in (3, 4):
        one = task(rows, columns)
        assert one.sensitivity is not None and one.sensitivity.kept is not None
        stored = SqueezeLLM(weights=f"nuq{bits}").solve(one).weight  # type: ignore[arg-type]
        count = int(one.sensitivity.kept.sum())
        assert 8 * stored.nbytes == bits * rows * columns + 16 * 2**bits * rows + 32 * count + 32 * (rows + 1)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_trained_model_loses_less_than_by_rounding_at_the_same_width(trained: Any, bits: int) -> None:
    dense = SqueezeLLM(weights=f"nuq{bits}", sensitive=0, outliers=0)  # type: ignore[arg-type]
    kept = SqueezeLLM(weights=f"nuq{bits}", sensitive=0.005, outliers=0.02)  # type: ignore[arg-type]
    plain = RTN(weights=f"int{bits}:asym:minmax")  # type: ignore[arg-type]
    losses = [trained.loss(dither.quantize(trained.model, m, trained.calibration).model) for m in (plain, dense, kept)]
    assert losses == sorted(losses, reverse=True)
