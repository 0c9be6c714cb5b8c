"""Levels fitted to the cells of a format."""

import pytest
import torch

from dither.errors import SpecError
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.solvers.kmeans import kmeans
from dither.solvers.levels import fit_levels


def drawn(rows: int = 6, columns: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.rand(rows, columns, generator=generator) ** 4


@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [
        ("nuq3:channel", slice(2, 3), slice(None)),
        ("nuq3:tensor", slice(None), slice(None)),
        ("nuq2:g8", slice(2, 3), slice(8, 16)),
        ("nuq2:g3:ic", slice(3, 6), slice(5, 6)),
    ],
)
def test_each_cell_is_fitted_on_its_own(text: str, rows: slice, columns: slice) -> None:
    weight, importance = drawn()
    spec = QuantSpec.parse(text)
    stored = quantize(weight, fit_levels(weight, spec, importance)).dequantize()
    cell, weighed = weight[rows, columns].reshape(1, -1), importance[rows, columns].reshape(1, -1)
    expected = kmeans(cell, weighed, spec.levels).error
    found = (weighed * (stored[rows, columns].reshape(1, -1) - cell).square()).sum(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-6)  # levels are rounded to float16


def test_what_does_not_count_does_not_pull_a_level() -> None:
    weight, importance = drawn()
    weight[:, 3], importance[:, 3] = 100.0, 0.0
    grid = fit_levels(weight, QuantSpec.parse("nuq3"), importance)
    assert float(grid.levels.max()) < 10
    assert float(fit_levels(weight, QuantSpec.parse("nuq3"), None).levels.max()) == 100


def test_other_formats_are_refused() -> None:
    for text in ("int4", "nf4:g8", "nuq2:g8:dual"):
        with pytest.raises(SpecError, match="levels are fitted for nuqB"):
            fit_levels(*drawn()[:1], QuantSpec.parse(text), None)
