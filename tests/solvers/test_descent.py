"""Descent rules: steps of the rate's size, whatever the gradient's, and Adam as torch computes it."""

import pytest
import torch

from dither.solvers.descent import Descent, Rule


@pytest.mark.parametrize("rule", ["sign", "momentum", "adam"])
def test_a_first_step_has_the_size_of_the_rate(rule: Rule) -> None:
    parameter = torch.zeros(4)
    Descent(rule).step_(parameter, torch.tensor([5.0, -1e-3, 0.0, 200.0]), 0.25)
    torch.testing.assert_close(parameter, torch.tensor([-0.25, 0.25, 0.0, -0.25]), rtol=1e-4, atol=1e-6)


def test_momentum_goes_on_against_a_single_other_gradient() -> None:
    parameter, descent = torch.zeros(1), Descent("momentum")
    for gradient in (1.0, 1.0, 1.0, -1.0):
        descent.step_(parameter, torch.tensor([gradient]), 1.0)
    assert float(parameter) == -4


def test_adam_is_torchs() -> None:
    mine, true, descent = torch.zeros(3), torch.zeros(3, requires_grad=True), Descent("adam")
    optimizer = torch.optim.Adam([true], lr=0.1, betas=(0.9, 0.99), eps=1e-30)
    for seed in range(5):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        true.grad = gradient.clone()
        optimizer.step()
        descent.step_(mine, gradient, 0.1)
    torch.testing.assert_close(mine, true.detach(), rtol=1e-4, atol=1e-5)
