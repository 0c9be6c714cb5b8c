"""Calibration batches: the first sample of a batch, of any plain kind."""

from typing import Any

import pytest
import torch

from dither.data.calibration import one_sample

X, Y = torch.arange(6).reshape(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("batch", "first"),
    [(X, X[:1]), ((X, Y), (X[:1], Y[:1])), ({"a": X, "b": Y}, {"a": X[:1], "b": Y[:1]})],
)
def test_the_first_sample_of_a_batch_is_a_batch(batch: Any, first: Any) -> None:
    found, count = one_sample(batch)
    assert count == 3
    assert type(found) is type(first)
    torch.testing.assert_close(found, first)


@pytest.mark.parametrize("batch", [{"a": X, "b": torch.ones(2)}, {"a": X, "b": 1}, (X, torch.tensor(1.0)), "text", {}])
def test_a_batch_whose_samples_are_not_plain_stays_whole(batch: Any) -> None:
    found, count = one_sample(batch)
    assert found is batch
    assert count == 1
