"""The loop over columns: what it computes, part by part, and the same on a GPU."""

import pytest
import torch
from torch import Tensor

from dither.formats.fit import fit_uniform
from dither.formats.spec import QuantSpec
from dither.kernels.column_sweep import sweep_uniform_

FORMATS = ("int3:channel:sym", "int2:channel:asym:realzero:minmax", "int4:channel:asym")


def case(text: str, columns: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, QuantSpec]:
    """Columns as rows, an upper factor, and one grid a row for all columns."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=generator)
    upper = torch.randn(columns, columns, generator=generator, dtype=dtype).triu() / 4
    upper.diagonal().abs_().add_(0.5)
    spec = QuantSpec.parse(text)
    grid = fit_uniform(weight, spec)
    scale, zero_point = (part.to(dtype).T.expand(columns, -1) for part in (grid.scale, grid.zero_point))
    return weight.T.to(dtype).contiguous(), upper, scale, zero_point, spec


def by_hand(block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Entry by entry."""
    block, values, errors = block.clone(), torch.empty_like(block), torch.empty_like(block)
    for k in range(len(block)):
        for row in range(block.shape[1]):
            s, z, w = scale[k, row], zero_point[k, row], block[k, row]
            code = torch.round(w / s + z) if spec.zero_point == "real" else torch.round(w / s) + z
            values[k, row] = s * (code.clamp(0, spec.levels - 1) - z)
            errors[k, row] = (w - values[k, row]) / upper[k, k]
            block[k + 1 :, row] -= upper[k, k + 1 :] * errors[k, row]
    return values, errors


@pytest.mark.parametrize("text", FORMATS)
def test_a_block_is_swept_as_by_hand(text: str) -> None:
    block, upper, scale, zero_point, spec = case(text, 7, 3, torch.float64)
    values, errors = sweep_uniform_(block.clone(), upper, scale, zero_point, spec, 0)
    wanted = by_hand(block, upper, scale, zero_point, spec)
    torch.testing.assert_close(values, wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(errors, wanted[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parts_of_a_block_one_after_the_other_are_the_block(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    block, upper, scale, zero_point, spec = case("int3:channel:sym", 12, 5, torch.float64)
    block, upper, scale, zero_point = (x.to(device) for x in (block, upper, scale, zero_point))
    whole = sweep_uniform_(block.clone(), upper, scale, zero_point, spec, 0)
    first = sweep_uniform_(block, upper, scale[:5], zero_point[:5], spec, 0)
    second = sweep_uniform_(block, upper, scale[5:], zero_point[5:], spec, 5)
    for part, one, other in zip(whole, first, second, strict=True):
        torch.testing.assert_close(torch.cat([one, other]), part, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 576), (33, 50), (1, 1)])
@pytest.mark.parametrize("text", FORMATS)
def test_the_kernel_gives_what_torch_gives(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    block, upper, scale, zero_point, spec = case(text, *shape, dtype)
    there = [x.cuda() for x in (block, upper, scale, zero_point)]
    values, _ = sweep_uniform_(block, upper, scale, zero_point, spec, 0)
    found = sweep_uniform_(there[0], *there[1:], spec, 0)
    # a sum that ends near the middle of two codes may fall to the other side, and what follows then differs
    same = ((found[0].cpu() - values).abs() < 1e-4).all(dim=0).double().mean()
    assert same > (0.999 if dtype == torch.float64 else 0.9)
    if dtype == torch.float64:
        torch.testing.assert_close(there[0].cpu(), block, rtol=1e-9, atol=1e-9)
