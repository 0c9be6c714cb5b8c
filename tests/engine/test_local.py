"""Engines: results in order, errors raised, and the same codes wherever the work ran."""

import os
from functools import partial

import pytest
import torch
from torch import Tensor

from dither.engine.local import InProcess, ProcessPool, engine
from dither.errors import SpecError
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.solvers.columns import round_by_columns


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_worker_means_this_process() -> None:
    assert isinstance(engine(1), InProcess) and isinstance(engine(0), InProcess)
    assert list(engine(1).map(str, [3, 1, 2])) == ["3", "1", "2"]
    assert list(engine(1).map(lambda _: os.getpid(), range(2))) == [os.getpid()] * 2


def test_this_process_works_only_when_asked_for_the_next_result() -> None:
    seen: list[int] = []
    results = InProcess().map(seen.append, [1, 2])
    assert seen == []
    next(results)
    assert seen == [1]


def test_an_error_of_this_process_is_raised_at_its_turn() -> None:
    results = InProcess().map(QuantSpec.parse, ["int4", "int9"])
    assert next(results) == QuantSpec(bits=4)
    with pytest.raises(SpecError, match="bits must be 1 to 8"):
        next(results)


@pytest.mark.slow
def test_a_pool_gives_the_same_codes_in_order_raises_errors_and_ends() -> None:
    x = drawn(80, 12)
    weights = [drawn(6, 12, seed=seed) for seed in range(1, 6)]
    spec = QuantSpec.parse("int3:asym")
    grids = [fit_grid(weight, spec) for weight in weights]
    solve = partial(round_by_columns, gram=x.T @ x, grid=grids[0], columns=12, damping=0.01, act_order=True)
    pool = engine(2)
    assert isinstance(pool, ProcessPool)
    with pool:
        found, expected = list(pool.map(solve, weights)), list(InProcess().map(solve, weights))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(quantize(one.weight, grids[0]).codes, quantize(other.weight, grids[0]).codes)
            assert one.notes == other.notes
        far = pool.map(partial(fit_grid, spec=spec), weights)
        assert all(torch.equal(one.scale, other.scale) for one, other in zip(far, grids, strict=True))
        results = pool.map(QuantSpec.parse, ["int4", "int9"])
        assert next(results) == QuantSpec(bits=4)
        with pytest.raises(SpecError, match="bits must be 1 to 8"):
            next(results)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.map(str, [1])
