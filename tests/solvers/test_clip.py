"""The clip search against trying every cut for every group by hand."""

import itertools

import pytest
import torch
from torch import Tensor

from dither.formats.cells import cell_errors
from dither.formats.fit import fit_uniform
from dither.formats.spec import QuantSpec
from dither.solvers.clip import clip_range

SPECS = ["int3:g4:asym:tight:clampzero", "int3:channel:asym", "int3:g4:sym", "int3:tensor", "int3:g2:ic:asym"]


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 8, generator=generator) ** 3
    x = torch.randn(30, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    return weight, x


def awq_round(group: Tensor, bits: int) -> Tensor:
    """AWQ's quantizer of one group, written out."""
    top = 2**bits - 1
    scale = float(((group.max() - group.min()).clamp_min(1e-5) / top).half())
    zero = (-torch.round(group.min() / scale)).clamp(0, top)
    return scale * ((torch.round(group / scale) + zero).clamp(0, top) - zero)


def test_each_group_gets_the_cut_of_least_error_of_its_own_products() -> None:
    weight, x = draw()
    grid = clip_range(weight, QuantSpec.parse("int3:g4:asym:tight:clampzero"), x.T @ x)
    found = grid.round(weight)
    for row, group in itertools.product(range(4), range(2)):
        part = slice(4 * group, 4 * group + 4)
        w, inputs = weight[row, part], x[:, part]
        tried = []
        for step in range(10):
            cut = float(w.abs().max()) * (1 - step / 20)
            tried.append(float((inputs @ (w - awq_round(w.clamp(-cut, cut), 3))).square().sum()))
        error = float((inputs @ (w - found[row, part])).square().sum())
        assert error == pytest.approx(min(tried), rel=1e-4)


@pytest.mark.parametrize("text", SPECS)
def test_no_cell_is_worse_than_with_its_extremes(text: str) -> None:
    weight, x = draw()
    spec, gram = QuantSpec.parse(text), x.T @ x
    before, after = fit_uniform(weight, spec), clip_range(weight, spec, gram)
    one, two = (cell_errors(weight - grid.round(weight), gram, grid) for grid in (before, after))
    assert bool((two <= one * (1 + 1e-6)).all())
    assert float(two.sum()) < float(one.sum())


def test_without_a_gram_all_inputs_count_alike() -> None:
    weight, _ = draw()
    spec = QuantSpec.parse(SPECS[0])
    one, two = clip_range(weight, spec, None), clip_range(weight, spec, 3 * torch.eye(8))
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one.zero_point, two.zero_point)


def test_a_constant_group_and_zeros_stay() -> None:
    weight = torch.cat([torch.zeros(2, 4), torch.full((2, 4), 0.5)], dim=1)
    rounded = clip_range(weight, QuantSpec.parse("int3:g4:asym"), None).round(weight)
    torch.testing.assert_close(rounded, weight, rtol=1e-3, atol=0)
