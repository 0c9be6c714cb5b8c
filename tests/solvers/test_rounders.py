"""Grids side by side, and what a sweep is told about columns."""

import pytest
import torch
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.codebook import Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import Grid
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import QuantSpec
from dither.solvers.rounders import Keeping, OnTheWay, Rounder, on_grid, side_by_side

TEXTS = [
    "int3:g4:asym:tight:realzero",
    "int3:g4:asym:tight:realzero:s3.2",
    "int2:g4",
    "nf4:g4",
    "nf4:g4:s4.2",
    "nuq2:g4",
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alone(text: str) -> QuantSpec:
    return QuantSpec.parse(text).model_copy(update={"granularity": "channel", "group_size": None})


def fitted(group: Tensor, text: str) -> Grid | Codebook:
    if text.startswith("nuq"):
        return Codebook.of_levels(alone(text), group[:, None].sort(dim=2).values)
    return fit_grid(group, alone(text))


@pytest.mark.parametrize("text", TEXTS)
def test_side_by_side_every_column_keeps_the_grid_of_its_group(text: str) -> None:
    weight, column_of = drawn(5, 12), torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1])
    groups = [(column_of == k).nonzero()[:, 0] for k in range(3)]
    grids = [fitted(weight[:, group], text) for group in groups]
    joined = side_by_side(grids, QuantSpec.parse(text), column_of)
    for group, grid in zip(groups, grids, strict=True):
        torch.testing.assert_close(joined.round(drawn(5, 4), group), grid.round(drawn(5, 4), slice(None)))
    stored = quantize(weight, joined)
    again = QTensor.unpack(stored.pack(), stored.layout)
    assert torch.equal(again.dequantize(), stored.dequantize())


@pytest.mark.parametrize(
    "text", ["int3:asym", "int3:g3:ic:asym", "int3:g2", "int4:tensor", "int4:dual", "nf4:g2", "fp4"]
)
def test_a_place_of_the_sweep_is_rounded_on_the_grid_of_its_column(text: str) -> None:
    weight, order = drawn(6, 8).double(), torch.tensor([3, 1, 7, 0, 2])
    grid = fit_grid(weight, QuantSpec.parse(text))
    rounder = on_grid(grid, weight, order)
    expected = grid.round(weight)
    for place, column in enumerate(order.tolist()):
        torch.testing.assert_close(rounder.value(place, weight[:, column]), expected[:, column], rtol=0, atol=1e-12)


def test_kept_entries_stay_and_their_group_sees_the_mean_of_the_others() -> None:
    seen: list[Tensor] = []

    def fit(group: Tensor, columns: Tensor) -> Grid | Codebook:
        seen.append(group)
        return fit_grid(group, alone("int2:g2"))

    weight, order = torch.tensor([[1.0, 8.0, 3.0, 4.0], [1.0, 2.0, 3.0, 9.0]]), torch.tensor([1, 0, 3, 2])
    kept = torch.tensor([[False, True, False, False], [False, False, False, True]])
    rounder: Rounder = Keeping.of(OnTheWay.of(QuantSpec.parse("int2:g2"), order, fit), kept, order)
    assert rounder.size == 2
    rounder.enter(2, weight[:, order].T[2:])
    assert seen[0].tolist() == [[4, 3], [3, 3]]
    assert rounder.value(2, weight[:, 3])[1] == 9
    assert rounder.value(2, weight[:, 3])[0] != 9


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ShapeError, match="does not divide 5 inputs"):
        OnTheWay.of(QuantSpec.parse("int2:g2"), torch.arange(5), lambda group, _: fit_grid(group, alone("int2:g2")))
