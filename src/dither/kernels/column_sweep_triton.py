"""The Triton kernel behind `column_sweep`: every program takes some rows of the weight through all columns of a block.

Imported only where Triton is; `kernels/column_sweep.py` says what it computes.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_ROWS = 16  # of the weight a program takes; few, since a layer has few and the loop over columns is one chain
_WIDTH = 64


def launch(
    block_: Float[Tensor, "n o"],
    corner: Float[Tensor, "n n"],
    scale: Float[Tensor, "m o"],
    zero_point: Float[Tensor, "m o"],
    start: int,
    ends: tuple[float, float],
    whole: bool,
) -> tuple[Float[Tensor, "m o"], Float[Tensor, "m o"]]:
    """`sweep_uniform_` on a GPU; `ends` are the lowest and highest code, `whole` says that zero-points are integers."""
    columns, rows = block_.shape
    values, errors = torch.empty_like(block_[: len(scale)]), torch.empty_like(block_[: len(scale)])
    # adding and taking off leaves whole numbers; exact in the float32 that Triton passes numbers as
    magic = 1.5 * 2.0 ** (52 if block_.dtype == torch.float64 else 23)
    scale, zero_point = scale.to(block_).contiguous(), zero_point.to(block_).contiguous()
    _sweep[(triton.cdiv(rows, _ROWS),)](
        block_, corner, scale, zero_point, values, errors, columns, rows, start, start + len(scale), *ends, magic,
        block_.stride(0), corner.stride(0), corner.stride(1), whole, _WIDTH, _ROWS, block_.dtype == torch.float64,
        num_warps=2,
    )  # fmt: skip
    return values, errors


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    block, corner, scale, zero, values, errors, columns, rows, start, stop, low, high, magic,
    block_row, corner_row, corner_column,
    whole: tl.constexpr, width: tl.constexpr, height: tl.constexpr, double: tl.constexpr,
):  # fmt: skip
    """Rows of the weight lie along the last axis; a tile is [width columns, height rows]."""
    dtype = tl.float64 if double else tl.float32
    place = tl.arange(0, width)
    row = tl.program_id(0) * height + tl.arange(0, height)
    there = row < rows
    inside = (place < columns)[:, None] & there[None, :]
    at = block + place[:, None] * block_row + row[None, :]
    tile = tl.load(at, mask=inside, other=0.0).to(dtype)
    for k in range(start, stop):
        own = place == k
        column = tl.sum(tl.where(own[:, None], tile, 0.0), axis=0)  # exact: all others are zero
        s = tl.load(scale + (k - start) * rows + row, mask=there, other=1.0).to(dtype)
        z = tl.load(zero + (k - start) * rows + row, mask=there, other=0.0).to(dtype)
        steps = column / s if double else tl.div_rn(column, s)
        if whole:
            steps = tl.minimum(tl.maximum(steps, -1048576.0), 1048576.0)
            codes = (steps + magic) - magic + z  # to the nearest, even between two
        else:
            steps = tl.minimum(tl.maximum(steps + z, -1048576.0), 1048576.0)
            codes = (steps + magic) - magic
        codes = tl.minimum(tl.maximum(codes, low), high)
        value = s * (codes - z)
        behind = tl.load(
            corner + k * corner_row + place * corner_column, mask=(place >= k) & (place < columns), other=0.0
        ).to(dtype)
        diagonal = tl.sum(tl.where(own, behind, 0.0), axis=0)
        error = (column - value) / diagonal if double else tl.div_rn(column - value, diagonal + tl.zeros_like(column))
        tile -= tl.where(place > k, behind, 0.0)[:, None] * error[None, :]
        out = (k - start) * rows + row
        tl.store(values + out, value, mask=there)
        tl.store(errors + out, error, mask=there)
    tl.store(at, tile, mask=inside & (place > start)[:, None])
