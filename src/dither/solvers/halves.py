"""Round half of the columns that are left, let the rest absorb the error by ridge regression, repeat.

Source: ERQ (Zhong et al., ICML 2024; arXiv 2407.06794), weight quantization error reduction (Wqer).
Departs from the released code: solves are Cholesky solves on the streamed Gram; the last column of a layer without bias
is rounded like any other.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.grid import Grid, highest_code, lowest_code
from dither.solvers.refine import refine_codes
from dither.solvers.ridge import ridge


def round_by_halves(
    weight: Float[Tensor, "o k"], gram: Float[Tensor, "k k"], grid: Grid, columns: int, lam: float, refine_steps: int
) -> Float[Tensor, "o k"]:
    """The weight with its first `columns` columns on the grid; a trailing bias column stays free and absorbs.

    `gram` is the plain sum ÂᵀÂ and `lam` is on that sum.
    """
    weight, gram, start = weight.clone(), gram.to(weight), 0
    while start < columns:
        count = max(1, (weight.shape[1] - start) // 2)
        now, rest = slice(start, min(start + count, columns)), slice(min(start + count, columns), None)
        value = round_and_refine(weight[:, now], gram[now, now], grid, now, refine_steps)
        error = value - weight[:, now]
        weight[:, now] = value
        if rest.start < weight.shape[1]:
            weight[:, rest] -= ridge(gram[rest, rest], gram[rest, now] @ error.T, lam).T
        start = now.stop
    return weight


def round_and_refine(
    target: Float[Tensor, "o n"], proxy: Float[Tensor, "n n"], grid: Grid, columns: slice, steps: int
) -> Float[Tensor, "o n"]:
    """Round to nearest, then choose between floor and ceiling where the second moment of the inputs favours it."""
    codes = grid.encode(target, columns)
    if steps == 0:
        return grid.decode(codes, columns)
    bounds = grid.encode(target, columns, "floor"), grid.encode(target, columns, "ceil")
    scale = grid.cells(columns)[0].to(target).expand_as(target)
    error = grid.decode(codes, columns) - target
    return grid.decode(_refine(codes, bounds, scale, error, proxy, steps), columns)


def _refine(
    codes: Float[Tensor, "o n"],
    bounds: tuple[Float[Tensor, "o n"], Float[Tensor, "o n"]],
    scale: Float[Tensor, "o n"],
    error: Float[Tensor, "o n"],
    proxy: Float[Tensor, "n n"],
    steps: int,
) -> Float[Tensor, "o n"]:
    """`refine_codes` in float32: its passes over the matrix are bound by memory, and codes are small integers."""
    unit = proxy.diagonal().mean().clamp_min(torch.finfo(proxy.dtype).tiny)  # the proxy's unit does not matter
    single = (part.float() for part in (codes, *bounds, scale, error, proxy / unit))
    codes32, low, high, scale32, error32, proxy32 = single
    return refine_codes(codes32, (low, high), scale32, error32, proxy32, steps).to(codes)


def refine_all(
    weight: Float[Tensor, "o k"],
    target: Float[Tensor, "o k"],
    gram: Float[Tensor, "k k"],
    grid: Grid,
    columns: int,
    lam: float,
    steps: int,
) -> Float[Tensor, "o k"]:
    """Move codes of the whole matrix by single steps while (W - target) (G + lam I) (W - target)ᵀ falls.

    A free bias column is eliminated by its Schur complement and refitted at the end, so that every move counts what the
    bias can still absorb.
    """
    weight, gram = weight.clone(), gram.to(weight).clone()
    gram.diagonal().add_(lam)
    on, free = slice(0, columns), slice(columns, None)
    proxy, share = gram[on, on], None
    if columns < weight.shape[1]:
        share = torch.linalg.solve(gram[free, free], gram[free, on])
        proxy = proxy - gram[on, free] @ share
    codes, scale = grid.encode(weight[:, on]), grid.cells()[0].to(weight).expand(weight.shape[0], columns)
    limits = (torch.full_like(codes, lowest_code(grid.spec)), torch.full_like(codes, highest_code(grid.spec)))
    error = grid.decode(codes) - target[:, on]
    weight[:, on] = grid.decode(_refine(codes, limits, scale, error, proxy, steps))
    if share is not None:
        weight[:, free] = target[:, free] - (weight[:, on] - target[:, on]) @ share.T
    return weight
