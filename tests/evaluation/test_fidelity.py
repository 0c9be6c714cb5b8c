"""Fidelity measures against values known by hand, and what each refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import InputError, NonFiniteError, ShapeError
from dither.evaluation import agreement, kl_divergence, sqnr_db, top1


def draw(rows: int, classes: int, seed: int) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_error_of_a_tenth_of_the_amplitude_is_20_db() -> None:
    reference = draw(5, 7, 0)
    assert sqnr_db(reference, 1.1 * reference) == pytest.approx(20, abs=1e-9)


def test_equal_outputs_have_infinite_ratio_and_an_error_on_silence_minus_infinity() -> None:
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


def test_half_precision_outputs_are_summed_in_float64() -> None:
    reference = torch.full((4096, 16), 200.0, dtype=torch.float16)  # squares overflow in half precision
    assert sqnr_db(reference, reference * 1.5) == pytest.approx(20 * math.log10(2), abs=1e-9)


def test_kl_of_two_coins_is_known() -> None:
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)
    wanted = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    logits = [torch.stack([x.log(), x.log()]) for x in (p, q)]
    assert kl_divergence(*logits) == pytest.approx(wanted, rel=1e-12)


def test_kl_is_a_mean_over_rows_also_beyond_one_chunk() -> None:
    reference, logits = draw(2500, 3, 1), draw(2500, 3, 2)
    rows = [kl_divergence(reference[i : i + 1], logits[i : i + 1]) for i in range(2500)]
    assert kl_divergence(reference, logits) == pytest.approx(sum(rows) / 2500, rel=1e-12)


@settings(deadline=None)
@given(rows=st.integers(1, 5), classes=st.integers(1, 9), seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_kl_is_never_negative_and_blind_to_a_shift_of_the_logits(
    rows: int, classes: int, seed: int, shift: float
) -> None:
    reference, logits = draw(rows, classes, seed), draw(rows, classes, seed + 1)
    divergence = kl_divergence(reference, logits)
    assert divergence >= 0
    assert kl_divergence(reference + shift, logits) == pytest.approx(divergence, abs=1e-9)
    assert kl_divergence(reference, reference + shift) == pytest.approx(0, abs=1e-9)


def test_agreement_and_top1_are_shares_of_rows() -> None:
    reference = torch.eye(4)
    logits = reference.clone()
    logits[0] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    assert agreement(reference, logits) == 0.75
    assert top1(logits, [1, 1, 2, 0]) == 0.75


@pytest.mark.parametrize("measure", [sqnr_db, kl_divergence, agreement])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_an_error_on_either_side(measure, bad: float) -> None:
    fine, broken = torch.zeros(2, 3), torch.zeros(2, 3)
    broken[1, 2] = bad
    with pytest.raises(NonFiniteError, match="got 1 NaN or Inf of 6 values in the approximation"):
        measure(fine, broken)
    with pytest.raises(NonFiniteError, match="in the reference"):
        measure(broken, fine)


def test_top1_of_nan_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="in logits"):
        top1(torch.full((1, 2), math.nan), [0])


@pytest.mark.parametrize("measure", [sqnr_db, kl_divergence, agreement])
def test_shapes_that_would_broadcast_are_refused(measure) -> None:
    with pytest.raises(ShapeError, match=r"shape \(4, 3\) in both, got \(1, 3\)"):
        measure(torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(InputError, match="at least one value"):
        measure(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("measure", [kl_divergence, agreement])
def test_logits_must_have_one_row_per_picture(measure) -> None:
    with pytest.raises(ShapeError, match=r"\(rows, classes\), got \(3,\)"):
        measure(torch.zeros(3), torch.zeros(3))


def test_class_ids_must_fit_the_logits() -> None:
    with pytest.raises(InputError, match="got 1 ids for 2 rows"):
        top1(torch.zeros(2, 3), [0])
    with pytest.raises(InputError, match=r"in 0..2, the model's classes, got 0..3"):
        top1(torch.zeros(2, 3), [0, 3])
    with pytest.raises(InputError, match=r"got -1..0"):
        top1(torch.zeros(2, 3), [0, -1])
    with pytest.raises(InputError, match="at least one row"):
        top1(torch.zeros(0, 3), [])
