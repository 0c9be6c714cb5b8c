"""The distance of an activation from stored statistics."""

import pytest
import torch

from dither.statistics.batchnorm import EPS, Over, channel_moments, moments_loss


def test_moments_are_of_each_sample_or_of_the_batch() -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    mean, variance = channel_moments(x, "sample")
    torch.testing.assert_close(mean, x.mean(dim=(2, 3)))
    torch.testing.assert_close(variance, x.var(dim=(2, 3)))
    mean, variance = channel_moments(x, "batch")
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3))[None])
    torch.testing.assert_close(variance, x.var(dim=(0, 2, 3))[None])
    mean, variance = channel_moments(x[..., 0, 0], "sample")  # of a linear layer: nothing to average but the batch
    torch.testing.assert_close(mean, x[..., 0, 0].mean(dim=0)[None])


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_the_loss_is_the_papers_and_vanishes_where_the_statistics_match(over: Over) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    mean, variance = torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    found = [(part.mean(dim=(1, 2)), part.var(dim=(1, 2))) for part in x]
    if over == "batch":
        found = [(x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3)))]
    expected = sum(
        (m - mean).square().sum() + ((v + EPS).sqrt() - (variance + EPS).sqrt()).square().sum() for m, v in found
    ) / len(found)
    torch.testing.assert_close(moments_loss(x, mean, variance, over), expected)
    one = x[:1]
    assert float(moments_loss(one, one.mean(dim=(0, 2, 3)), one.var(dim=(0, 2, 3)), over)) < 1e-20
