"""GWQ: the mask by brute force, its bits, and that what the gradient keeps is worth keeping."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.calibrate import LayerTask
from dither.methods import GWQ
from dither.models.gradients import Gradients
from dither.models.network import open_network
from dither.statistics.gram import Gram
from dither.statistics.sensitivity import Sensitivity


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def masks(trained: Any, method: GWQ) -> dict[str, Tensor]:
    gradients = Gradients(trained.model, open_network(trained.model).run, trained.calibration)
    found = method.sensitivities(layers_of(trained.model), gradients)
    return {name: part.kept for name, part in found.items() if part.kept is not None}


def scores(trained: Any, sample: int, taylor: bool) -> dict[str, Tensor]:
    """Of one sequence, by plain autograd."""
    ids = torch.cat([batch["input_ids"] for batch in trained.calibration])[sample]
    weights = {name: trained.model.get_submodule(name).weight for name in layers_of(trained.model)}
    with torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_(True)
        loss = functional.cross_entropy(trained.model(input_ids=ids[None]).logits[0, :-1], ids[1:])
        found = torch.autograd.grad(loss, list(weights.values()))
        for weight in weights.values():
            weight.requires_grad_(False)
    pairs = zip(weights.items(), found, strict=True)
    return {name: (gradient * weight if taylor else gradient).abs() for (name, weight), gradient in pairs}


def largest(score: Tensor, count: int) -> Tensor:
    """By sorting."""
    limit = sorted(score.flatten().tolist(), reverse=True)[count - 1]
    return score >= limit


@pytest.mark.parametrize("taylor", [False, True])
def test_the_mask_holds_the_highest_scores_of_one_sequence_in_each_layer(trained: Any, taylor: bool) -> None:
    found = masks(trained, GWQ(sample=9, fraction=0.02, score="taylor" if taylor else "gradient"))
    for name, score in scores(trained, 9, taylor).items():
        assert torch.equal(found[name], largest(score, round(0.02 * score.numel())))


def test_the_share_may_be_of_each_row_or_of_the_whole_model(trained: Any) -> None:
    true = scores(trained, 0, False)
    rows = masks(trained, GWQ(fraction=0.05, scope="row"))
    for name, score in true.items():
        expected = torch.stack([largest(row, round(0.05 * len(row))) for row in score])
        assert torch.equal(rows[name], expected)
    whole = masks(trained, GWQ(fraction=0.05, scope="global"))
    together = torch.cat([score.flatten() for score in true.values()])
    limit = together.sort(descending=True).values[round(0.05 * len(together)) - 1]
    assert all(torch.equal(whole[name], score >= limit) for name, score in true.items())
    assert len({float(mask.float().mean()) for mask in whole.values()}) > 1


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_nothing_is_kept_where_nothing_is_asked_for(trained: Any, scope: str) -> None:
    assert not any(bool(mask.any()) for mask in masks(trained, GWQ(fraction=0, scope=scope)).values())  # type: ignore[arg-type]


def task(kept_share: float, rows: int = 64, columns: int = 128) -> LayerTask:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    kept.view(-1)[torch.randperm(kept.numel(), generator=generator)[: round(kept_share * kept.numel())]] = True
    mixed = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    x = torch.randn(400, columns, generator=generator) @ mixed
    return LayerTask("fc", weight, None, Gram.of(x), sensitivity=Sensitivity(kept=kept))


def test_one_percent_beside_three_bits_in_small_groups_stays_below_four() -> None:
    one = task(0.01, 512, 512)
    stored = GWQ().solve(one).weight
    by_hand = 3 + 6 / 16 + 64 / 256 + 32 * 0.01
    assert stored.bits_per_weight == pytest.approx(by_hand + 32 * 513 / 512**2, abs=1e-3)
    assert by_hand == pytest.approx(3.945)
    assert stored.bits_per_weight < 4.01


@pytest.mark.parametrize("rounding", ["nearest", "columns"])
def test_kept_weights_do_not_stretch_their_group_and_come_back_exactly(rounding: str) -> None:
    one = task(0.02)
    assert one.sensitivity is not None and one.sensitivity.kept is not None
    kept = one.sensitivity.kept
    one.weight[kept] *= 40
    stored = GWQ(rounding=rounding, weights="int4:g16").solve(one).weight.dequantize()  # type: ignore[arg-type]
    assert float((stored - one.weight)[~kept].abs().mean()) < 0.2
    if rounding == "nearest":
        torch.testing.assert_close(stored[kept], one.weight[kept], rtol=2e-3, atol=1e-3)


def test_compensating_column_by_column_errs_less_in_the_output() -> None:
    one = task(0.01)
    assert one.gram is not None
    errors = []
    for rounding in ("nearest", "columns"):
        stored = GWQ(rounding=rounding).solve(one).weight.dequantize(torch.float64)  # type: ignore[arg-type]
        errors.append(one.gram.output_error(one.weight.double(), stored))
    assert errors[1] < 0.7 * errors[0]


def test_without_a_gram_columns_are_rounded_to_nearest_which_the_notes_say() -> None:
    one = task(0.01)
    bare = LayerTask("conv", one.weight, None, None, sensitivity=one.sensitivity)
    found = GWQ(rounding="columns").solve(bare)
    assert found.notes["rounding"] == "nearest: grouped convolution"
    assert torch.equal(found.weight.codes, GWQ().solve(one).weight.codes)
    assert GWQ().solve(LayerTask("fc", one.weight, None, None)).weight.sparse is None


def test_what_the_gradient_keeps_is_worth_more_than_nothing(trained: Any) -> None:
    losses = []
    for fraction in (0.0, 0.05, 0.2):
        method = GWQ(weights="int2:g16", fraction=fraction)  # type: ignore[arg-type]
        losses.append(trained.loss(dither.quantize(trained.model, method, trained.calibration).model))
    assert losses == sorted(losses, reverse=True)
    assert losses[2] - trained.loss(trained.model) < 0.7 * (losses[0] - trained.loss(trained.model))
