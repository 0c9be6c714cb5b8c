"""Low-rank corrections against singular value decompositions, brute force and each other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dither.errors import NonFiniteError, ShapeError
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.solvers.low_rank import corrected, output_directions, reconstruct_error

SHAPES = [(6, 9), (9, 6), (8, 8)]


def draw(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An error matrix and the second moment of correlated inputs of very unlike size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(50, columns, generator=generator, dtype=torch.float64) @ mixing
    x *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    return error, x.T @ x / len(x)


def projected(error: Tensor, rank: int, moment: Tensor | None) -> Tensor:
    left = output_directions(error, rank, moment)
    return left @ left.T @ error


def left_over(error: Tensor, correction: Tensor, moment: Tensor) -> float:
    rest = error - correction
    return float(((rest @ moment) * rest).sum())


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.sqrt()) @ vectors.T


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_correction_is_the_papers_truncated_decomposition_behind_the_root(
    shape: tuple[int, int], rank: int
) -> None:
    error, moment = draw(*shape)
    expected = truncated(error @ root(moment), rank) @ root(moment).inverse()
    torch.testing.assert_close(projected(error, rank, moment), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_is_the_tail_of_the_squared_singular_values(shape: tuple[int, int]) -> None:
    error, moment = draw(*shape)
    values = torch.linalg.svdvals(error @ root(moment)).square()
    for rank in range(1, 6):
        found = left_over(error, projected(error, rank, moment), moment)
        assert found == pytest.approx(float(values[rank:].sum()), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_inputs_and_with_the_identity_it_is_the_plain_decomposition(shape: tuple[int, int]) -> None:
    error, moment = draw(*shape)
    for same in (None, torch.ones_like(moment[0]), torch.eye(shape[1], dtype=torch.float64)):
        torch.testing.assert_close(projected(error, 2, same), truncated(error, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diagonal_counts_as_the_matrix_of_that_diagonal(shape: tuple[int, int]) -> None:
    error, moment = draw(*shape)
    diagonal = moment.diagonal()
    torch.testing.assert_close(projected(error, 2, diagonal), projected(error, 2, torch.diag(diagonal)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_more_knowledge_of_the_inputs_leaves_less_output_error(shape: tuple[int, int], seed: int) -> None:
    error, moment = draw(*shape, seed=seed)
    exact, approx, identity = (
        left_over(error, projected(error, 2, known), moment) for known in (moment, moment.diagonal(), None)
    )
    assert exact < approx < identity


def test_no_other_direction_is_better_on_a_matrix_of_two_rows() -> None:
    error, moment = draw(2, 5)
    angles = torch.linspace(0, torch.pi, 2001, dtype=torch.float64)
    units = torch.stack([angles.cos(), angles.sin()], dim=1)
    tried = [left_over(error, torch.outer(unit, unit @ error), moment) for unit in units]
    assert left_over(error, projected(error, 1, moment), moment) == pytest.approx(min(tried), rel=1e-5)
    assert left_over(error, projected(error, 1, moment), moment) <= min(tried)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_singular_second_moment_is_fine(shape: tuple[int, int]) -> None:
    error, _ = draw(*shape)
    x = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moment = x.T @ x
    assert left_over(error, projected(error, 2, moment), moment) == pytest.approx(0, abs=1e-9 * float(moment.trace()))
    assert bool(reconstruct_error(error.float(), 4, moment).dense().isfinite().all())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_factors_keep_the_correction_and_every_rank_helps(shape: tuple[int, int], dtype: Any) -> None:
    error, moment = draw(*shape)
    left = [left_over(error, reconstruct_error(error.float(), r, moment, dtype).dense(), moment) for r in range(1, 6)]
    assert left == sorted(left, reverse=True)
    best = left_over(error, projected(error, 2, moment), moment)
    assert left[1] <= best * (1 + {"float16": 5e-6, "int8": 1e-3}[dtype])  # measured: 2e-6 and 3e-4


def test_the_rank_ends_at_the_smaller_side_where_the_correction_is_the_error() -> None:
    error, moment = draw(6, 9)
    found = reconstruct_error(error.float(), 32, moment)
    assert found.rank == 6
    torch.testing.assert_close(found.dense(), error.float(), rtol=0, atol=5e-3)


def test_rows_and_columns_of_the_factors_have_like_norms() -> None:
    error, moment = draw(30, 40)
    found = reconstruct_error(1e-4 * error.float(), 5, moment)
    torch.testing.assert_close(found.a.norm(dim=1), found.b.norm(dim=0), rtol=1e-2, atol=0)


def test_no_error_needs_no_correction() -> None:
    assert not bool(reconstruct_error(torch.zeros(4, 6), 2, None).dense().any())


def test_a_stored_weight_keeps_its_codes_and_comes_closer_and_a_second_correction_replaces_the_first() -> None:
    weight, moment = (part.float() for part in draw(8, 8))
    stored = quantize(weight, fit_grid(weight, QuantSpec.parse("int3")))
    once = corrected(stored, weight, 2, moment)
    twice = corrected(once, weight, 2, moment)
    assert torch.equal(once.codes, stored.codes)
    before, after = (left_over(weight, each.dequantize(), moment) for each in (stored, once))
    assert after < 0.5 * before  # measured: 0.1
    assert torch.equal(once.dequantize(), twice.dequantize())


def test_wrong_arguments_are_refused() -> None:
    error, moment = draw(4, 6)
    with pytest.raises(ShapeError, match="rank of at least 1, got 0"):
        reconstruct_error(error, 0, moment)
    with pytest.raises(ShapeError, match="6 x 6"):
        reconstruct_error(error, 1, moment[:5, :5])
    with pytest.raises(NonFiniteError, match="second moment"):
        reconstruct_error(error, 1, moment / 0)
