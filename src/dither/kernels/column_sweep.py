"""GPTQ's inner loop over the columns of a lazy block on a uniform grid: round one, let those behind it compensate.

Source: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), Algorithm 1, the loop within a block. Rows do not depend on
each other, so on a GPU one program takes a few rows through all columns, where torch would start a dozen kernels a
column. Both give the same codes but for rounding of the last bit.
"""

from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.grid import decode, encode, highest_code, lowest_code
from dither.formats.spec import QuantSpec

WIDEST = 64  # columns of a block that the kernel holds


def sweep_uniform_(
    block_: Float[Tensor, "n o"],
    corner: Float[Tensor, "n n"],
    scale: Float[Tensor, "m o"],
    zero_point: Float[Tensor, "m o"],
    spec: QuantSpec,
    start: int,
) -> tuple[Float[Tensor, "m o"], Float[Tensor, "m o"]]:
    """Values and errors of the columns `start` to start + m of a block, whose rows are columns of the weight.

    `corner` is the block's part of the upper factor. In place every column takes the compensation of those before it;
    a column of `block_` is afterwards what it was at its turn. Errors are divided by the factor's diagonal.
    """
    if block_.is_cuda and block_.shape[0] <= WIDEST and has_triton():
        from dither.kernels.column_sweep_triton import launch

        ends = float(lowest_code(spec)), float(highest_code(spec))
        whole = spec.zero_point != "real" and spec.bits > 1
        return launch(block_, corner, scale, zero_point, start, ends, whole)
    values, errors = torch.empty_like(scale), torch.empty_like(scale)
    for k, diagonal in enumerate(corner.diagonal()[start : start + len(scale)].tolist(), start):
        cell = scale[k - start], zero_point[k - start]
        values[k - start] = decode(encode(block_[k], *cell, spec), *cell)
        error = torch.sub(block_[k], values[k - start], out=errors[k - start]).div_(diagonal)
        block_[k + 1 :].addr_(corner[k, k + 1 :], error, alpha=-1)
    return values, errors


@cache
def has_triton() -> bool:
    """Whether the compiler of the kernel is there; it comes with torch for CUDA."""
    return find_spec("triton") is not None
