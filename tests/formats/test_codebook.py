"""Codebooks: every entry against a search over all levels, the published tables, and what must hold on any codebook."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.errors import ShapeError, SpecError
from dither.formats.codebook import FIXED_LEVELS, Codebook
from dither.formats.fit import fit_grid
from dither.formats.grid import column_index, grid_shape
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec

TEXTS = ["nuq3", "nuq1", "nuq4:tensor", "nuq3:g4", "nuq3:dual", "nuq2:g4:dual", "nuq3:g2:ic", "nf4", "nf4:g4", "fp4:g4"]
TEXTS += ["nf4:g4:s8.4", "fp4:g2:ic", "nf4:tensor"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def codebook(text: str, weight: Tensor) -> Codebook:
    spec, (rows, columns) = QuantSpec.parse(text), weight.shape
    if spec.kind != "nuq":
        found = fit_grid(weight, spec)
        assert isinstance(found, Codebook)
        return found
    column_of = column_index(spec, columns, weight.device)
    if spec.dual:
        half = torch.arange(columns) % 3 % 2
        column_of = half if column_of is None else 2 * column_of + half
    row_of = torch.arange(rows) // (spec.group_size or 1) if spec.group_along == "outputs" else None
    levels = drawn(*grid_shape(spec, rows, columns), spec.levels, seed=1)
    return Codebook.of_levels(spec, levels, row_of, column_of)


def levels_of(book: Codebook, row: int, column: int) -> Tensor:
    """Values that an entry can take, by the class's own words."""
    r = row if book.row_of is None else int(book.row_of[row])
    c = column if book.column_of is None else int(book.column_of[column])
    table, scale = book.levels, book.scale
    levels = table[r if len(table) > 1 else 0, c if table.shape[1] > 1 else 0]
    return levels.double() * float(scale[r if len(scale) > 1 else 0, c if scale.shape[1] > 1 else 0])


@pytest.mark.parametrize("mode", ["nearest", "floor", "ceil"])
@pytest.mark.parametrize("text", TEXTS)
def test_values_are_those_of_a_search_over_all_levels(text: str, mode: str) -> None:
    weight = drawn(6, 12)
    book = codebook(text, weight)
    found = book.round(weight, mode=mode)  # type: ignore[arg-type]
    for row in range(6):
        for column in range(12):
            levels, x = levels_of(book, row, column), float(weight[row, column])
            below, above = [v for v in levels.tolist() if v <= x], [v for v in levels.tolist() if v >= x]
            expected = {
                "nearest": float(levels[(levels - x).abs().argmin()]),
                "floor": max(below, default=float(levels.min())),
                "ceil": min(above, default=float(levels.max())),
            }[mode]
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("text", TEXTS)
def test_some_columns_alone_get_what_they_get_in_the_whole(text: str) -> None:
    weight = drawn(6, 12)
    book = codebook(text, weight)
    codes, values = book.encode(weight), book.round(weight)
    for columns in (slice(2, 7), slice(0, 1), slice(11, None), torch.tensor([5, 0, 11, 3])):
        assert torch.equal(book.encode(weight[:, columns], columns), codes[:, columns])
        assert torch.equal(book.round(weight[:, columns], columns), values[:, columns])
        assert torch.equal(book.decode(codes[:, columns], columns), values[:, columns])


@settings(max_examples=30, deadline=None)
@given(text=st.sampled_from(TEXTS), seed=st.integers(0, 10**6))
def test_values_on_the_levels_are_kept(text: str, seed: int) -> None:
    book = codebook(text, drawn(6, 12, seed=seed))
    values = book.round(drawn(6, 12, seed=seed + 1) * 2)
    for mode in ("nearest", "floor", "ceil"):
        assert torch.equal(book.round(values, mode=mode), values)  # type: ignore[arg-type]
    assert torch.equal(quantize(values, book).dequantize(torch.float64), values.float().double())


@settings(max_examples=30, deadline=None)
@given(text=st.sampled_from(["nf4:g4", "fp4:g4", "nf4", "nf4:tensor"]), seed=st.integers(0, 10**6))
def test_the_largest_magnitude_of_a_cell_is_kept_up_to_the_precision_of_its_scale(text: str, seed: int) -> None:
    weight = drawn(6, 12, seed=seed)
    found = codebook(text, weight).round(weight)
    size = {"nf4:g4": 4, "fp4:g4": 4, "nf4": 12, "nf4:tensor": 72}[text]
    largest = weight.reshape(-1, size).abs().max(dim=1)
    kept = found.reshape(-1, size).gather(1, largest.indices[:, None])[:, 0].abs()
    torch.testing.assert_close(kept, largest.values, rtol=2e-3, atol=0)


def test_the_levels_are_the_published_ones() -> None:
    nf4, fp4 = torch.tensor(FIXED_LEVELS["nf"]), torch.tensor(FIXED_LEVELS["fp"])
    assert len(nf4) == len(fp4) == 16 and len(fp4.unique()) == 15  # fp4 has a zero of either sign
    assert bool((nf4.diff() > 0).all()) and bool((fp4.diff() >= 0).all())
    assert nf4[0] == -1 and nf4[7] == 0 and nf4[-1] == 1
    magnitudes = torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
    torch.testing.assert_close(fp4[8:], magnitudes)
    torch.testing.assert_close(fp4[:8], -magnitudes.flip(0))
    probabilities = torch.linspace(0.5, 0.9677083, 9)  # QLoRA: quantiles of a normal, both halves have a zero
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(probabilities)
    torch.testing.assert_close(nf4[7:], quantiles / quantiles[-1], rtol=0, atol=1e-4)


def test_levels_come_in_any_order_and_are_stored_in_the_scale_dtype() -> None:
    spec = QuantSpec.parse("nuq2")
    book = Codebook.of_levels(spec, torch.tensor([[[0.1, -3.0, 2.0, 0.0]]]))
    assert torch.equal(book.levels, torch.tensor([-3.0, 0.0, 0.1, 2.0]).half().float()[None, None])
    assert book.encode(torch.tensor([[-9.0, -1.4, 0.06, 9.0]])).tolist() == [[0, 1, 2, 3]]
    wide = Codebook.of_levels(spec.model_copy(update={"scale_dtype": "float32"}), torch.tensor([[[0.1, 1, 2, 3]]]))
    assert float(wide.levels[0, 0, 0]) == pytest.approx(0.1, abs=1e-8)


def test_what_cannot_be_a_codebook_is_refused() -> None:
    with pytest.raises(ShapeError, match="nuq2:channel has 4 levels a cell, got 3"):
        Codebook.of_levels(QuantSpec.parse("nuq2"), torch.zeros(1, 1, 3))
    with pytest.raises(SpecError, match=r"a level of 1e.05 does not fit into float16"):
        Codebook.of_levels(QuantSpec.parse("nuq1"), torch.tensor([[[0.0, 1e5]]]))
    with pytest.raises(SpecError, match=r"nuq4:channel needs a method that fits a codebook.* squeezellm"):
        fit_grid(torch.zeros(2, 2), QuantSpec.parse("nuq4"))
