"""Rounding refinement: move single codes by one step wherever that lowers the output error.

Source: ERQ (Zhong et al., ICML 2024), rounding refinement on the proxy d C dᵀ.
Departs from the released code: it proposes the entry of largest gradient and reverts a proposal that does not help;
here every candidate's exact change is known from the maintained gradient, so the best one is taken and none reverted.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def refine_codes(
    codes: Float[Tensor, "o n"],
    bounds: tuple[Float[Tensor, "o n"], Float[Tensor, "o n"]],
    scale: Float[Tensor, "o n"],
    error: Float[Tensor, "o n"],
    proxy: Float[Tensor, "n n"],
    steps: int,
) -> Float[Tensor, "o n"]:
    """Codes after at most `steps` single moves a row, each the move of greatest decrease of d C dᵀ.

    `error` is d, the value of the codes minus their target; codes stay within `bounds`. Rows are independent, and the
    proxy falls with every move, so the result is never worse than what was given.
    """
    codes, error, (low, high) = codes.clone(), error.clone(), bounds
    gradient = 2 * error @ proxy
    curvature = scale.square() * proxy.diagonal()
    rows = torch.arange(codes.shape[0], device=codes.device)
    # a strict decrease beyond rounding noise, else two equal codes could be exchanged for ever
    noise = -4096 * torch.finfo(proxy.dtype).eps
    for _ in range(steps):
        slope = scale * gradient
        up = torch.where(codes < high, curvature + slope, torch.inf)
        down = torch.where(codes > low, curvature - slope, torch.inf)
        change, column = torch.minimum(up, down).min(dim=1)
        moving = change < noise * curvature[rows, column]
        if not bool(moving.any()):
            break
        at, where = rows[moving], column[moving]
        direction = torch.where(up[at, where] < down[at, where], 1.0, -1.0).to(codes)
        codes[at, where] += direction
        delta = direction * scale[at, where]
        error[at, where] += delta
        gradient[at] += 2 * delta[:, None] * proxy[where]
    return codes
