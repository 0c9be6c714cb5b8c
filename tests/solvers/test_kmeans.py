"""Weighted k-means on a line: the optimum on short rows, never worse than scikit-learn on long ones."""

from collections.abc import Callable
from itertools import combinations, pairwise
from time import perf_counter

import pytest
import torch
from torch import Tensor

from dither.errors import ShapeError
from dither.solvers.kmeans import kmeans


def draw(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Heavy-tailed values, and weights as skewed as squared gradients are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * (1 + torch.rand(rows, columns, generator=generator) ** 8)
    return values, torch.randn(rows, columns, generator=generator) ** 4 * 1e-9


def interval_error(values: Tensor, weights: Tensor) -> float:
    mean = (values * weights).sum() / weights.sum()
    return float((weights * (values - mean).square()).sum())


def brute_force(values: Tensor, weights: Tensor, levels: int) -> float:
    """The least error over every way to cut the sorted values into `levels` intervals."""
    order = values.argsort()
    x, w, n = values[order].double(), weights[order].double(), len(values)
    cuts = ([0, *inner, n] for inner in combinations(range(1, n), levels - 1))
    return min(sum(interval_error(x[a:b], w[a:b]) for a, b in pairwise(c)) for c in cuts)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_short_rows_get_the_optimum(levels: int) -> None:
    values, weights = draw(4, 9)
    found = kmeans(values, weights, levels)
    expected = [brute_force(*row, levels) for row in zip(values, weights, strict=True)]
    assert found.error.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_candidates_lose_little_of_the_optimum(levels: int) -> None:
    values, weights = draw(8, 400)
    near, optimum = kmeans(values, weights, levels).error, kmeans(values, weights, levels, candidates=400).error
    assert float((near / optimum).max()) < 1.01  # measured: 1.004 at 16 levels


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_no_row_is_worse_than_scikit_learns(levels: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    values, weights = draw(4, 576)
    found = kmeans(values, weights, levels).error
    for row, error in enumerate(found.tolist()):
        w = (weights[row] / weights[row].max()).double().numpy()
        model = cluster.KMeans(levels, random_state=0, n_init=3).fit(values[row, :, None].double().numpy(), None, w)
        assert error <= 1.01 * model.inertia_ * float(weights[row].max())


def test_the_error_is_that_of_the_codes_and_each_code_is_the_nearest() -> None:
    values, weights = draw(5, 200)
    found = kmeans(values, weights, 8)
    distance = (values[:, :, None] - found.centroids[:, None, :]).abs()
    chosen = distance.gather(2, found.codes.long()[:, :, None])[:, :, 0]
    torch.testing.assert_close(chosen, distance.amin(dim=2), rtol=0, atol=1e-6)
    torch.testing.assert_close((weights.double() * chosen.double().square()).sum(dim=1), found.error, rtol=1e-5, atol=0)


def test_each_centroid_is_the_mean_of_its_values_and_they_are_sorted() -> None:
    values, weights = draw(5, 200)
    found = kmeans(values, weights, 8)
    chosen = torch.nn.functional.one_hot(found.codes.long(), 8) * weights[:, :, None]
    means = (chosen * values[:, :, None]).sum(dim=1) / chosen.sum(dim=1)
    torch.testing.assert_close(found.centroids, means, rtol=1e-4, atol=1e-5)
    assert bool((found.centroids.diff(dim=1) > 0).all())


def test_more_steps_of_lloyd_never_raise_the_error() -> None:
    values, weights = draw(6, 300)
    errors = torch.stack([kmeans(values, weights, 8, steps, candidates=16).error for steps in range(6)])
    assert bool((errors.diff(dim=0) <= 1e-9 * errors[0]).all())
    assert bool((errors[-1] < errors[0]).any())


def test_values_of_zero_weight_do_not_count_but_get_their_nearest_code() -> None:
    values, weights = draw(3, 400)
    weights[:, ::3] = 0
    values[:, ::3] *= 1000
    values[:, 0], values[:, 3] = 1e4, -1e4
    found = kmeans(values, weights, 16)
    without = kmeans(values[:, weights[0] > 0], weights[:, weights[0] > 0], 16)
    torch.testing.assert_close(found.centroids, without.centroids)
    assert found.codes[:, 0].tolist() == [15, 15, 15]
    assert found.codes[:, 3].tolist() == [0, 0, 0]


def test_a_row_without_weight_counts_all_values_alike() -> None:
    values, _ = draw(2, 50)
    torch.testing.assert_close(kmeans(values, torch.zeros_like(values), 4).centroids, kmeans(values, None, 4).centroids)


def test_centroids_stay_among_the_values_where_weights_are_lost_in_rounding() -> None:
    values = torch.cat([torch.linspace(0, 1, 40), 10 + torch.linspace(0, 1, 40)]).double()[None]
    weights = torch.cat([torch.ones(40), torch.full((40,), 3e-15)]).double()[None]
    found = kmeans(values, weights, 60).centroids
    assert bool((found.diff(dim=1) >= 0).all())
    assert 0 <= float(found.min()) <= float(found.max()) <= 11


def test_scale_and_place_of_the_values_do_not_matter() -> None:
    values, weights = draw(4, 200)
    plain, moved = kmeans(values.double(), weights, 8), kmeans(values.double() * 1e-3 + 5, weights * 1e-12, 8)
    assert torch.equal(plain.codes, moved.codes)
    torch.testing.assert_close(moved.centroids, plain.centroids * 1e-3 + 5)
    torch.testing.assert_close(moved.error, plain.error * 1e-18, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "values", [[[1.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0, 2.0]], [[-1.0, 2.0, 2.0, 2.0]]], ids=["one", "two", "sides"]
)
@pytest.mark.parametrize("levels", [3, 4, 8])
def test_few_different_values_are_represented_exactly(values: list[list[float]], levels: int) -> None:
    row = torch.tensor(values)
    found = kmeans(row, None, levels)
    assert torch.equal(found.centroids.gather(1, found.codes.long()), row)
    assert bool((found.centroids.diff(dim=1) >= 0).all())
    assert float(found.error) == 0


@pytest.mark.parametrize("kind", ["bfloat16", "clustered"])
def test_repeated_values_lose_nothing(kind: str) -> None:
    values, _ = draw(3, 500)
    values = values.bfloat16().float() if kind == "bfloat16" else values.round()
    near, optimum = kmeans(values, None, 8).error, kmeans(values, None, 8, candidates=500).error
    assert bool((near <= 1.01 * optimum + 1e-9).all())


@pytest.mark.parametrize("wrong", [lambda v: kmeans(v, None, 0), lambda v: kmeans(v, -v.abs(), 4)])
def test_wrong_arguments_are_refused(wrong: Callable[[Tensor], object]) -> None:
    with pytest.raises(ShapeError, match="expected"):
        wrong(torch.ones(2, 4))


def test_a_weight_of_a_small_language_model_takes_about_a_second() -> None:
    values, weights = draw(256, 576)
    start = perf_counter()
    kmeans(values, weights, 8)
    assert perf_counter() - start < 2  # measured: 0.1 s of one core; 1536 rows take 0.6 s
