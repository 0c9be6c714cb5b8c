"""Second moments of gradients: sums that merge, and a Hessian whose size does not matter."""

import pytest
import torch

from dither.errors import ShapeError
from dither.statistics.gradients import Fisher, GradientGram


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))


def test_fisher_sums_squares_of_each_sample_and_not_of_their_sum() -> None:
    gradients = drawn()
    found = Fisher.of(gradients[0]).merge(Fisher.of(gradients[1])).merge(Fisher.of(gradients[2]))
    expected = gradients[0] ** 2 + gradients[1] ** 2 + gradients[2] ** 2
    torch.testing.assert_close(found.squares, expected, rtol=1e-6, atol=0)
    assert found.samples == 3


def test_the_gradient_gram_is_the_sum_over_rows_of_each_rows_outer_product() -> None:
    gradients = drawn()
    found = GradientGram.of(gradients[0]).merge(GradientGram.of(gradients[1]))
    expected = torch.zeros(5, 5)
    for sample in gradients[:2]:
        for row in sample:
            expected += torch.outer(row, row)
    torch.testing.assert_close(found.gram, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_the_hessian_has_a_mean_diagonal_of_one_however_small_the_gradients(size: float) -> None:
    found = GradientGram.of(drawn()[0] * size).hessian()
    torch.testing.assert_close(found, GradientGram.of(drawn()[0]).hessian(), rtol=1e-5, atol=1e-6)
    assert float(found.diagonal().mean()) == pytest.approx(1)


def test_without_any_gradient_the_hessian_is_the_identity() -> None:
    assert torch.equal(GradientGram.of(torch.zeros(3, 5)).hessian(), torch.eye(5))


def test_statistics_of_other_layers_do_not_merge() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 5\) and \(3, 4\)"):
        Fisher.of(torch.ones(3, 5)).merge(Fisher.of(torch.ones(3, 4)))
    with pytest.raises(ShapeError):
        GradientGram.of(torch.ones(3, 5)).merge(GradientGram.of(torch.ones(3, 4)))
