"""Rows of a batch: the last axis stays, half becomes float32, what is not finite is counted and refused."""

import pytest
import torch

from dither.errors import NonFiniteError
from dither.statistics.base import as_rows
from dither.statistics.extremes import MinMax
from dither.statistics.gram import Gram
from dither.statistics.moments import Moments
from dither.statistics.sample import RowSample


def test_rows_are_the_last_axis_in_float32_or_wider() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(as_rows(x), x.reshape(6, 4))
    assert as_rows(x.half()).dtype == as_rows(x.bfloat16()).dtype == torch.float32
    assert as_rows(x.double()).dtype == torch.float64
    assert not as_rows(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("statistic", [Gram.of, MinMax.of, Moments.of, RowSample.of])
def test_every_statistic_refuses_what_is_not_finite_and_counts_it(statistic: object, bad: float) -> None:
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = x[0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match="hold 2 NaN or Inf among 24 values"):
        statistic(x)  # type: ignore[operator]
