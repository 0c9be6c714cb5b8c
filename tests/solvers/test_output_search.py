"""Ranges searched by a layer's output: equal to brute force, never worse than where they began."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dither.formats.activation import fake_quantize
from dither.formats.fit import grid_of_ranges
from dither.formats.spec import QuantSpec
from dither.solvers.output_search import Candidates, Target, search_in_turns, search_input, search_weight
from dither.statistics.extremes import MinMax
from dither.statistics.output_rows import OutputRows

HOW = Candidates(lowest=0.2, highest=1.2, count=20, rounds=2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(inputs: Tensor, weighing: Tensor | None = None) -> OutputRows:
    return OutputRows(inputs, weighing, MinMax.of(inputs))


@pytest.mark.parametrize("text", ["int3:channel:sym", "int3:tensor:sym", "int3:g4:sym", "int3:g3:ic", "int3:asym"])
def test_each_row_of_scales_takes_the_share_that_brute_force_finds(text: str) -> None:
    inputs, weight, spec = drawn(30, 8), drawn(6, 8, seed=1), QuantSpec.parse(text)
    target = Target.of(rows(inputs, drawn(30, 6, seed=2).square()), weight)
    grid = search_weight(weight, spec, inputs, target, HOW)
    found = target.errors(inputs @ grid.round(weight).T)
    start = search_weight(weight, spec, inputs, target, Candidates(lowest=0.99, highest=1.0, count=1))
    low, high = -start.zero_point * start.scale, (7 - start.zero_point) * start.scale
    errors = []
    for share in HOW.shares:
        one = grid_of_ranges(low * share, high * share, spec, start.row_of, start.column_of)
        errors.append(target.errors(inputs @ one.round(weight).T))
    every = torch.stack(errors)
    best = {1: lambda: every.sum(1).amin()}.get(start.scale.shape[0], lambda: _sum_of_best(every, start.scale.shape[0]))
    # shares of slightly other ends where the zero-point was rounded, or the symmetric end is not a code
    torch.testing.assert_close(found.sum(), best(), rtol=0.15, atol=0)


def _sum_of_best(errors: Tensor, groups: int) -> Tensor:
    return errors.unflatten(1, (groups, -1)).sum(2).amin(0).sum()


def test_an_inputs_share_is_that_of_brute_force() -> None:
    inputs, weight, spec = drawn(40, 5), drawn(3, 5, seed=1), QuantSpec.parse("int4:tensor:sym")
    target = Target.of(rows(inputs), weight)
    _, scales, error = search_input(rows(inputs), spec, weight, target, HOW)
    largest = float(inputs.abs().max())
    brute = []
    for share in HOW.shares:
        step = torch.tensor(largest * share / 7.5), torch.tensor(8.0)
        brute.append(float(target.errors(fake_quantize(inputs, step, spec) @ weight.T).sum()))
    assert error == pytest.approx(min(brute), rel=1e-4)
    assert float(scales[0]) == pytest.approx(largest * HOW.shares[brute.index(min(brute))] / 7.5, rel=1e-5)


def test_behind_gelu_a_twin_is_chosen_and_not_behind_a_norm() -> None:
    spec, weight = QuantSpec.parse("int4:tensor:sym"), drawn(6, 16, seed=1)
    for inputs, kind in ((functional.gelu(drawn(200, 16)), "twin"), (drawn(200, 16), "int")):
        found, scales, error = search_input(rows(inputs), spec, weight, Target.of(rows(inputs), weight), HOW)
        assert found.kind == kind
        plain = Candidates(HOW.lowest, HOW.highest, HOW.count, twin=False)
        alone = search_input(rows(inputs), spec, weight, Target.of(rows(inputs), weight), plain)
        assert alone[0] == spec and error <= alone[2]
        if kind == "twin":
            assert error < 0.6 * alone[2]  # measured: 0.48
            assert float(scales[0][0]) * 7 == pytest.approx(-float(inputs.min()))


@pytest.mark.parametrize("metric", ["squared", "cosine"])
def test_alternation_lowers_the_error_and_says_it(metric: str) -> None:
    inputs, weight = drawn(60, 12), drawn(5, 12, seed=1)
    errors = []
    for rounds in (1, 3):
        how = Candidates(0.2, 1.2, 40, rounds, metric)  # type: ignore[arg-type]
        found = search_in_turns(
            rows(inputs), weight, QuantSpec.parse("int3:sym"), QuantSpec.parse("int3:tensor:sym"), how
        )
        assert found.scales is not None and found.spec is not None
        seen = fake_quantize(inputs, found.scales, found.spec)
        output = seen @ found.grid.round(weight).T
        assert found.error == pytest.approx(
            float(Target.of(rows(inputs), weight, metric).errors(output).sum()),  # type: ignore[arg-type]
            rel=1e-4,
        )
        errors.append(found.error)
    assert errors[1] <= errors[0]


def test_without_an_input_format_only_the_weight_is_searched() -> None:
    inputs, weight = drawn(20, 6), drawn(4, 6, seed=1)
    found = search_in_turns(rows(inputs), weight, QuantSpec.parse("int4:sym"), None, HOW)
    assert found.scales is None and found.spec is None
    dynamic = QuantSpec.parse("int8:token")
    assert search_in_turns(rows(inputs), weight, QuantSpec.parse("int4:sym"), dynamic, HOW).scales is None


def test_what_weighs_nothing_is_not_looked_at() -> None:
    inputs, weight = drawn(40, 6), drawn(2, 6, seed=1)
    weighing = torch.zeros(40, 2)
    weighing[:5] = 1.0
    spec, how = QuantSpec.parse("int3:tensor:sym"), Candidates(0.2, 1.2, 60)
    few = rows(inputs, weighing)
    found = search_input(few, spec, weight, Target.of(few, weight), how)
    alone = OutputRows(inputs[:5], None, few.extremes)
    expected = search_input(alone, spec, weight, Target.of(alone, weight), how)
    assert torch.equal(found[1][0], expected[1][0])
