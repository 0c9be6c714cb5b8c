"""Equalization: the formulas of the released codes, and functions that stay what they were."""

import pytest
import torch
from torch import nn

from dither.transforms.equalize import awq_scale, equalization, fold_into_rows, smooth_scale
from dither.transforms.reparameterize import fold_into_linear, fold_into_norm

MAGNITUDE = torch.tensor([0.01, 0.5, 2.0, 30.0])


def test_awq_scales_are_powers_around_one() -> None:
    for alpha in (0.0, 0.5, 0.95):
        scale = awq_scale(MAGNITUDE, alpha)
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(scale / scale[1], (MAGNITUDE / 0.5) ** alpha)
    assert torch.equal(awq_scale(MAGNITUDE, 0.0), torch.ones(4))


def test_smoothing_makes_the_ranges_of_inputs_and_weights_alike_at_one_half() -> None:
    weight = torch.tensor([0.2, 0.1, 3.0, 0.4])
    scale = smooth_scale(MAGNITUDE, weight, 0.5)
    torch.testing.assert_close(MAGNITUDE / scale, weight * scale)
    torch.testing.assert_close(smooth_scale(MAGNITUDE, weight, 1.0), MAGNITUDE)


def test_dead_channels_keep_their_scale_and_do_not_move_the_others() -> None:
    dead = torch.cat([torch.zeros(1), MAGNITUDE])
    torch.testing.assert_close(awq_scale(dead, 0.5), torch.cat([torch.ones(1), awq_scale(MAGNITUDE, 0.5)]))
    assert float(smooth_scale(dead, torch.ones(5), 0.5)[0]) == 1
    assert awq_scale(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_a_norm_and_its_layers_compute_what_they_did() -> None:
    generator = torch.Generator().manual_seed(0)
    norm, layer, x = nn.LayerNorm(4), nn.Linear(4, 6), torch.randn(9, 4, generator=generator)
    with torch.no_grad():
        norm.bias.copy_(torch.randn(4, generator=generator))
    fold = equalization(awq_scale(MAGNITUDE, 0.7))
    weight, bias = fold_into_norm(norm.weight.detach(), norm.bias.detach(), fold)
    folded, same = fold_into_linear(layer.weight.detach(), layer.bias.detach(), fold)
    changed = nn.functional.layer_norm(x, (4,), weight, bias)
    torch.testing.assert_close(nn.functional.linear(changed, folded, same), layer(norm(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(changed * fold.ratio, norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_pair_of_layers_computes_what_it_did(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = nn.Linear(3, 4, bias=bias), nn.Linear(4, 5, bias=bias)
    x, gate = torch.randn(9, 3, generator=generator), torch.rand(9, 4, generator=generator)
    scale = awq_scale(MAGNITUDE, 0.5)
    weight, shifted = fold_into_rows(up.weight.detach(), up.bias.detach() if bias else None, scale)
    folded, same = fold_into_linear(down.weight.detach(), down.bias.detach() if bias else None, equalization(scale))
    changed = nn.functional.linear(gate * nn.functional.linear(x, weight, shifted), folded, same)
    torch.testing.assert_close(changed, down(gate * up(x)), rtol=1e-5, atol=1e-5)
