"""Binary weights against least squares by brute force, and the loop against its definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import ShapeError, SpecError
from dither.formats.qtensor import QTensor
from dither.formats.spec import QuantSpec
from dither.solvers.binary import (
    BinarySettings,
    binarize,
    block_levels,
    error_of_two,
    round_binary,
    split_block,
    split_errors,
)

SPEC = QuantSpec.parse("nuq2:g8:dual")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(columns: int, seed: int = 1) -> Tensor:
    x = drawn(4 * columns, columns, seed=seed) @ (drawn(columns, columns, seed=seed + 1) + torch.eye(columns))
    return x.T @ x


def cost(weight: Tensor, found: QTensor, hessian: Tensor) -> float:
    change = found.dequantize(torch.float64) - weight
    return float(((change @ hessian) * change).sum())


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_one_binarization_is_the_least_squares_choice_of_magnitude_and_signs(count: int, seed: int) -> None:
    x = drawn(1, count, seed=seed)
    off, best = x - x.mean(), torch.inf
    for signs in itertools.product((-1.0, 1.0), repeat=count):
        b = torch.tensor(signs, dtype=x.dtype)
        best = min(best, float((off - (off @ b) / count * b).square().sum()))
    found, levels = binarize(x)
    assert float((found - x).square().sum()) == pytest.approx(best, abs=1e-12)
    assert levels.shape == (1, 2)


@settings(max_examples=20, deadline=None)
@given(small=st.floats(0.0, 0.9), mean=st.floats(-2, 2), copies=st.integers(1, 3))
def test_two_binarizations_hold_four_symmetric_values_exactly(small: float, mean: float, copies: int) -> None:
    x = (mean + torch.tensor([[-1 - small, -1 + small, 1 - small, 1 + small]], dtype=torch.float64)).repeat(1, copies)
    found, levels = binarize(x, order=2)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(levels.sort(dim=1).values, x[:, :4], rtol=0, atol=1e-12)


def test_a_mask_is_the_same_as_the_masked_entries_alone() -> None:
    x, mask = drawn(3, 10), drawn(3, 10, seed=1) > 0
    for order in (1, 2):
        found, levels = binarize(x, mask, order)
        for row in range(3):
            chosen = mask[row]
            alone, own = binarize(x[row : row + 1, chosen], order=order)
            torch.testing.assert_close(found[row, chosen], alone[0])
            torch.testing.assert_close(levels[row], own[0])
            assert not bool(found[row, ~chosen].any())


def test_every_value_is_one_of_its_levels_and_more_binarizations_err_less() -> None:
    x = drawn(6, 40)
    errors = []
    for order in (1, 2, 3):
        found, levels = binarize(x, order=order)
        assert bool((found[:, :, None] == levels[:, None]).any(dim=2).all())
        errors.append(float((found - x).square().sum()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), count=st.integers(1, 12), positive=st.booleans(), seed=st.integers(0, 10**6))
def test_the_errors_of_candidates_are_those_of_binarizing(rows: int, count: int, positive: bool, seed: int) -> None:
    x = (drawn(rows, count, seed=seed) * 3).round() / 3
    x = x.abs() if positive else x
    splits = torch.tensor([0.0, 0.3, 1.0, 1.7, 9.0], dtype=x.dtype)
    for split, found in zip(splits, split_errors(x, splits), strict=True):
        outer = x.abs() > split
        expected = (binarize(x, outer)[0] + binarize(x, ~outer)[0] - x).square().sum()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    x = drawn(rows, count, seed=seed)  # no ties: the sign of a remainder of zero is rounding's
    torch.testing.assert_close(error_of_two(x), (binarize(x, order=2)[0] - x).square().sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("search", ["metric", "weight"])
def test_salient_columns_and_the_split_are_the_candidates_of_least_error(search: str) -> None:
    weight, diagonal = drawn(5, 12), drawn(12, seed=3).abs() + 0.2
    weight[:, [2, 7]] *= 5
    metric = (weight / diagonal).square()
    judged = metric if search == "metric" else weight
    found = split_block(weight, diagonal, "hessian", search)  # type: ignore[arg-type]
    ranked = metric.sum(dim=0).argsort(descending=True)
    errors = {}
    for k in range(1, 12):
        parts = [judged[:, ranked[:k]], judged[:, ranked[k:]]]
        errors[k] = sum(float((binarize(part, order=2)[0] - part).square().sum()) for part in parts)
    best = min(errors, key=lambda k: errors[k])
    assert set(found.salient.nonzero()[:, 0].tolist()) == set(ranked[:best].tolist())
    rest = judged[:, ~found.salient]
    sizes = rest.abs().flatten().sort().values
    shares = [0.1 + 0.8 * step / 80 for step in range(81)]
    errors = {}
    for split in (float(sizes[int(share * (len(sizes) - 1))]) for share in shares):
        outer = rest.abs() > split
        errors[split] = float((binarize(rest, outer)[0] + binarize(rest, ~outer)[0] - rest).square().sum())
    best_split = min(errors, key=lambda split: errors[split])
    assert torch.equal(found.outer[:, ~found.salient], rest.abs() > best_split)
    assert not bool(found.outer[:, found.salient].any())


def test_the_released_loop_written_out_gives_the_same_weights() -> None:
    weight, hessian = drawn(6, 24), moment(24)
    found, notes = round_binary(weight, hessian, SPEC, 0.01, False, BinarySettings())
    W = weight.clone()
    U = torch.linalg.cholesky(torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)), upper=True)
    salient = 0
    for start in (0, 8, 16):
        now, rest = slice(start, start + 8), slice(start + 8, 24)
        split = split_block(W[:, now], U.diagonal()[now], "hessian", "metric")
        values = block_levels(W[:, now], split)[0].half().double()
        W[:, rest] -= ((W[:, now] - values) / U.diagonal()[now]) @ U[now, rest]
        W[:, now] = values
        salient += int(split.salient.sum())
    torch.testing.assert_close(found.dequantize(torch.float64), W, rtol=1e-6, atol=1e-6)
    assert notes["salient"] == salient / 24
    assert notes["paper_bits"] == 1 + salient / 24


@pytest.mark.parametrize("feedback", ["diagonal", "block", "columns"])
@pytest.mark.parametrize("assignment", ["class", "nearest"])
@pytest.mark.parametrize("act_order", [False, True])
def test_what_is_stored_reads_back_bit_by_bit_and_its_bits_are_counted(
    feedback: str, assignment: str, act_order: bool
) -> None:
    weight, hessian = drawn(6, 24), moment(24)
    setting = BinarySettings(feedback=feedback, assignment=assignment)  # type: ignore[arg-type]
    found, _ = round_binary(weight, hessian, SPEC, 0.01, act_order, setting)
    again = QTensor.unpack(found.pack(), found.layout)
    assert torch.equal(again.dequantize(), found.dequantize())
    order = 8 * 24 if act_order else 0
    assert 8 * found.nbytes == 2 * 6 * 24 + 6 * 3 * 2 * 4 * 16 + 24 + order  # codes, levels, salient columns


def test_each_kind_of_feedback_lowers_the_error_of_the_output() -> None:
    none, totals = 0.0, dict.fromkeys(("diagonal", "block", "columns"), 0.0)
    for seed in range(4):
        weight, hessian = drawn(16, 64, seed=seed), moment(64, seed + 1)
        apart = hessian.diagonal().diag()  # a diagonal Hessian feeds nothing back
        none += cost(weight, round_binary(weight, apart, SPEC, 0.01, False, BinarySettings())[0], hessian)
        for feedback in totals:
            setting = BinarySettings(feedback=feedback)  # type: ignore[arg-type]
            totals[feedback] += cost(weight, round_binary(weight, hessian, SPEC, 0.01, False, setting)[0], hessian)
    assert none > totals["diagonal"] > totals["columns"]
    assert none > totals["block"] > totals["columns"]


def test_the_nearest_level_errs_less_than_that_of_the_class() -> None:
    weight, hessian = drawn(16, 64), torch.eye(64, dtype=torch.float64)
    costs = []
    for assignment in ("class", "nearest"):
        setting = BinarySettings(assignment=assignment)  # type: ignore[arg-type]
        costs.append(cost(weight, round_binary(weight, hessian, SPEC, 0.01, False, setting)[0], hessian))
    assert costs[1] < costs[0]


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = drawn(6, 24), moment(24)
    one = round_binary(weight, hessian, SPEC, 0.01, False, BinarySettings())[0]
    for scale in (1e-10, 1e6):
        other = round_binary(weight, scale * hessian, SPEC, 0.01, False, BinarySettings())[0]
        torch.testing.assert_close(other.dequantize(), one.dequantize(), rtol=1e-3, atol=1e-3)


def test_other_formats_and_blocks_that_do_not_divide_are_refused() -> None:
    for text in ("int2:g8", "nuq3:g8:dual", "nuq2:g8"):
        with pytest.raises(SpecError, match="binary weights are stored as nuq2:gN:dual"):
            round_binary(drawn(2, 8), moment(8), QuantSpec.parse(text), 0.01, False, BinarySettings())
    with pytest.raises(ShapeError, match="does not divide 9 inputs"):
        round_binary(drawn(2, 9), moment(9), SPEC, 0.01, False, BinarySettings())


def test_a_single_column_and_a_single_row_are_stored() -> None:
    for shape, text in (((3, 1), "nuq2:g1:dual"), ((1, 8), "nuq2:g8:dual")):
        weight, hessian = drawn(*shape), moment(shape[1])
        found = round_binary(weight, hessian, QuantSpec.parse(text), 0.01, False, BinarySettings())[0]
        assert bool(found.dequantize().isfinite().all())
