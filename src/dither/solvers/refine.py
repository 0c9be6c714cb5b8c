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
    codes, (low, high) = codes.clone(), bounds
    gradient, curvature = 2 * error @ proxy, scale.square() * proxy.diagonal()
    rows = torch.arange(codes.shape[0], device=codes.device)  # rows that may still move
    # a move must gain more than rounding noise, else two equal codes could be exchanged for ever
    noise = -1e-12 * curvature.amax(dim=1)
    for _ in range(steps):
        now, slope = codes[rows], scale[rows] * gradient
        up = (curvature[rows] + slope).masked_fill_(now >= high[rows], torch.inf)
        down = (curvature[rows] - slope).masked_fill_(now <= low[rows], torch.inf)
        change, column = torch.minimum(up, down).min(dim=1)
        moving = (change < noise[rows]).nonzero()[:, 0]
        if not len(moving):
            break
        rows, column = rows[moving], column[moving]
        direction = torch.where(up[moving, column] < down[moving, column], 1.0, -1.0).to(codes)
        codes[rows, column] += direction
        delta = direction * scale[rows, column]
        gradient = gradient[moving] + 2 * delta[:, None] * proxy[column]
    return codes
