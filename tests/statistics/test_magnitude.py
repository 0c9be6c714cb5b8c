"""Mean magnitudes, whole and in pieces."""

import pytest
import torch

from dither.errors import NonFiniteError
from dither.statistics.magnitude import Magnitude


def test_pieces_merge_to_the_mean_of_all_magnitudes() -> None:
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    found = Magnitude.of(x[:1]).merge(Magnitude.of(x[1:]))
    assert found.rows == 24
    torch.testing.assert_close(found.mean, x.double().abs().mean(dim=(0, 1)))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="1 NaN or Inf"):
        Magnitude.of(torch.tensor([[1.0, torch.nan]]))
