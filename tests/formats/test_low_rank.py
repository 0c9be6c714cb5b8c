"""Low-rank corrections: what is stored is what is used, and its bytes are counted by hand."""

import pytest
import torch
from torch import Tensor

from dither.errors import SpecError
from dither.formats.low_rank import LowRank


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_storing_and_reading_changes_nothing(dtype: str) -> None:
    before = LowRank.of(drawn(3, 20), drawn(7, 3, seed=1), dtype)  # type: ignore[arg-type]
    after = LowRank.unpack(before.pack(), before.dtype)
    assert torch.equal(after.a, before.a) and torch.equal(after.b, before.b)
    assert torch.equal(after.dense(), before.dense())
    assert before.nbytes == sum(part.nbytes for part in before.pack().values())
    again = LowRank.of(before.a, before.b, before.dtype)
    torch.testing.assert_close(again.dense(), before.dense(), rtol=1e-3, atol=1e-3)


def test_bytes_are_those_counted_by_hand() -> None:
    assert LowRank.of(drawn(3, 20), drawn(7, 3)).nbytes == 2 * (3 * 20 + 7 * 3)
    assert LowRank.of(drawn(3, 20), drawn(7, 3), "int8").nbytes == 3 * 20 + 7 * 3 + 2 * (3 + 3)


def test_float16_factors_are_those_given_to_within_half_a_step() -> None:
    a, b = drawn(2, 30), drawn(5, 2, seed=1)
    stored = LowRank.of(a, b)
    assert torch.equal(stored.a, a.half().float()) and torch.equal(stored.b, b.half().float())


def test_int8_factors_err_by_at_most_half_of_a_127th_of_the_largest_of_their_rank() -> None:
    a, b = drawn(4, 30) * torch.tensor([1.0, 10.0, 0.1, 0.0])[:, None], drawn(50, 4, seed=1)
    stored = LowRank.of(a, b, "int8")
    assert bool(((stored.a - a).abs() <= 0.501 / 127 * a.abs().amax(dim=1, keepdim=True)).all())
    assert bool(((stored.b - b).abs() <= 0.501 / 127 * b.abs().amax(dim=0)).all())
    torch.testing.assert_close(stored.dense(), stored.b.double().float() @ stored.a, rtol=1e-6, atol=1e-6)


def test_no_rank_at_all_corrects_nothing() -> None:
    assert torch.equal(LowRank.of(drawn(0, 4), drawn(3, 0)).dense(), torch.zeros(3, 4))


def test_a_factor_beyond_float16_is_refused() -> None:
    with pytest.raises(SpecError, match=r"a low-rank factor of 1e.05 does not fit into float16"):
        LowRank.of(torch.full((1, 2), 1e5), torch.ones(2, 1))
