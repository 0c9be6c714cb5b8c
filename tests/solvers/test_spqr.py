"""SpQR's loop against its definition, written out one weight at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.fit import fit_grid
from dither.formats.grid import decode, encode
from dither.formats.qtensor import QTensor
from dither.formats.ranges import affine
from dither.formats.spec import QuantSpec
from dither.solvers.columns import column_order, round_by_columns, round_by_groups
from dither.solvers.spqr import above_threshold, largest_share, round_with_outliers

TEXT = "int3:g4:asym:tight:realzero"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with a few that stand out."""
    weight = drawn(rows, columns, seed=seed)
    weight[drawn(rows, columns, seed=seed + 7) > 1.8] *= 6
    return weight


def moment(columns: int, seed: int = 1) -> Tensor:
    x = drawn(3 * columns, columns, seed=seed) @ (drawn(columns, columns, seed=seed + 1) + torch.eye(columns))
    return x.T @ x


def likely_outliers(row: Tensor, sensitivity: Tensor, spec: QuantSpec, limit: float) -> list[bool]:
    """Those that save more than the limit by leaving the group of one row."""

    def cost(part: Tensor, weigh: Tensor) -> float:
        scale, zero_point = affine(part.amin()[None], part.amax()[None], spec, stored=False)
        return float(((decode(encode(part, scale, zero_point, spec), scale, zero_point) - part) ** 2 * weigh).sum())

    base, found = cost(row, sensitivity), []
    for left in range(len(row)):
        rest = [k for k in range(len(row)) if k != left]
        found.append(base - cost(row[rest], sensitivity[rest]) > limit)
    return found


def written_out(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, damping: float, act_order: bool, tau: float
) -> tuple[Tensor, Tensor]:
    """The weight as SpQR leaves it and its outliers, in plain loops over the inverse's Cholesky factor."""
    (rows, columns), size = weight.shape, spec.group_size or weight.shape[1]
    order = column_order(hessian, columns, act_order)
    H = hessian[order][:, order] + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=weight.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    W, d = weight[:, order].clone(), U.diagonal()
    limit = tau * float((W.var(dim=0) / d**2).mean())
    alone = spec.model_copy(update={"granularity": "channel", "group_size": None})
    outliers = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if j % size == 0:
            group = W[:, j : j + size].clone()
            for row in range(rows):
                out = torch.tensor(likely_outliers(group[row], d[j : j + size] ** -2, spec, limit))
                if bool(out.any()):
                    group[row, out] = group[row, ~out].mean() if bool((~out).any()) else 0.0
            grid = fit_grid(group.float(), alone)
        value = grid.round(W[:, j : j + 1], slice(0, 1))[:, 0]
        outliers[:, j] = ((W[:, j] - value) / d[j]) ** 2 > limit
        value = torch.where(outliers[:, j], W[:, j], value)
        error = (W[:, j] - value) / d[j]
        W[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
        W[:, j] = value
    back = torch.argsort(order)
    return W[:, back], outliers[:, back]


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(2, 6), groups=st.integers(1, 4), act_order=st.booleans(), tau=st.sampled_from([0.02, 0.2, 1.0]),
    text=st.sampled_from([TEXT, "int2:g3:asym:tight:realzero", "int3:asym", "int3:g4:asym:tight:realzero:s3.2"]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_sweep_is_the_papers_loop(
    rows: int, groups: int, act_order: bool, tau: float, text: str, seed: int
) -> None:
    spec = QuantSpec.parse(text)
    weight = heavy(rows, groups * (spec.group_size or 3), seed)
    hessian = moment(weight.shape[1], seed + 1)
    found, notes = round_with_outliers(weight, hessian, spec, 1.0, act_order, above_threshold(tau), leave_one_out=True)
    expected, outliers = written_out(weight, hessian, spec, 1.0, act_order, tau)
    assert found.sparse is not None
    assert torch.equal(found.sparse.dense() != 0, outliers & (found.sparse.dense() != 0))
    assert notes["outliers"] == pytest.approx(float(outliers.double().mean()))
    assert found.sparse.count == int(outliers.sum())
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=2e-3, atol=2e-4)  # float16 outliers
    again = QTensor.unpack(found.pack(), found.layout)
    assert torch.equal(again.dequantize(), found.dequantize())


def test_with_no_outliers_it_is_gptq_with_groups_fitted_on_the_way() -> None:
    weight, hessian, spec = heavy(6, 16), moment(16), QuantSpec.parse(TEXT)
    alone = spec.model_copy(update={"granularity": "channel", "group_size": None})
    found, notes = round_with_outliers(weight, hessian, spec, 0.1, True, above_threshold(1e9), leave_one_out=True)
    expected = round_by_groups(weight, hessian, lambda group, _: fit_grid(group.float(), alone), spec, 16, 0.1, True)
    torch.testing.assert_close(found.dequantize(torch.float64), expected.weight, rtol=1e-6, atol=1e-6)
    assert notes["outliers"] == 0
    assert notes["damping"] == 0.1


@pytest.mark.parametrize("text", ["int3:tensor:asym", "int3:g2:ic:asym", "int4:dual", "nf4:g4"])
def test_other_formats_get_their_grid_once_and_outliers_all_the_same(text: str) -> None:
    weight, hessian, spec = heavy(8, 16), moment(16), QuantSpec.parse(text)
    found, _ = round_with_outliers(weight, hessian, spec, 0.1, True, above_threshold(1e9), leave_one_out=True)
    plain = round_by_columns(weight, hessian, fit_grid(weight.float(), spec), 16, 0.1, True).weight
    torch.testing.assert_close(found.dequantize(torch.float64), plain, rtol=1e-5, atol=1e-5)
    some, notes = round_with_outliers(weight, hessian, spec, 0.1, True, above_threshold(0.01), leave_one_out=True)
    assert 0 < notes["outliers"] < 0.9
    assert cost(weight, some, hessian) < cost(weight, found, hessian)


def cost(weight: Tensor, found: QTensor, hessian: Tensor) -> float:
    change = found.dequantize(torch.float64) - weight
    return float(((change @ hessian) * change).sum())


def test_a_lower_threshold_keeps_more_and_costs_less() -> None:
    weight, hessian, spec = heavy(24, 32), moment(32), QuantSpec.parse(TEXT)
    found = [
        round_with_outliers(weight, hessian, spec, 0.1, True, above_threshold(tau), True)
        for tau in (1e9, 0.1, 0.05, 0.02)
    ]
    shares, costs = [notes["outliers"] for _, notes in found], [cost(weight, one, hessian) for one, _ in found]
    assert shares == sorted(shares) and shares[0] == 0 and 0 < shares[1] < shares[2] < 0.1
    assert costs == sorted(costs, reverse=True)
    assert [one.nbytes for one, _ in found] == sorted(one.nbytes for one, _ in found)


def test_leaving_likely_outliers_out_of_the_ranges_lowers_the_error_of_the_rest() -> None:
    spec, costs = QuantSpec.parse("int3:g16:asym:tight:realzero"), {True: 0.0, False: 0.0}
    for seed in range(4):
        weight, hessian = heavy(24, 32, seed), moment(32, seed + 1)
        for leave in costs:
            costs[leave] += cost(
                weight, round_with_outliers(weight, hessian, spec, 0.1, True, above_threshold(0.2), leave)[0], hessian
            )
    assert costs[True] < 0.9 * costs[False]


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian, spec = heavy(6, 16), moment(16), QuantSpec.parse(TEXT)
    one, _ = round_with_outliers(weight, hessian, spec, 1.0, True, above_threshold(0.2), True)
    for scale in (1e-10, 1e8):
        other, _ = round_with_outliers(weight, scale * hessian, spec, 1.0, True, above_threshold(0.2), True)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.dequantize(), other.dequantize())


def test_a_group_that_does_not_divide_is_refused_before_any_work() -> None:
    with pytest.raises(ShapeError, match=r"group size 4 .* does not divide 6 inputs"):
        round_with_outliers(heavy(2, 6), moment(6), QuantSpec.parse(TEXT), 1.0, True, above_threshold(0.2), True)


def test_one_row_and_dead_columns_are_stored() -> None:
    weight, hessian = heavy(1, 8), moment(8)
    hessian[3] = hessian[:, 3] = 0
    found, _ = round_with_outliers(weight, hessian, QuantSpec.parse(TEXT), 1.0, True, above_threshold(0.2), True)
    assert bool(found.dequantize().isfinite().all())


@pytest.mark.parametrize("text", ["int2:g8:asym:tight:realzero:s3.16", "int4:g8:asym:tight:realzero"])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.02])
def test_a_share_of_outliers_is_kept_at_any_width(text: str, share: float) -> None:
    weight, hessian = heavy(128, 64).float().double(), moment(64)
    found, notes = round_with_outliers(
        weight, hessian, QuantSpec.parse(text), 0.1, True, largest_share(share), leave_one_out=True
    )
    assert found.sparse is not None
    assert notes["outliers"] * weight.numel() == found.sparse.count
    assert share / 2 <= notes["outliers"] <= 4 * share
