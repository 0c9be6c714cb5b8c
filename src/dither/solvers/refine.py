"""Rounding refinement: move single codes by one step wherever that lowers the output error.

Source: ERQ (Zhong et al., ICML 2024), rounding refinement on the proxy d C dᵀ.
Departs from the released code: it proposes the entry of largest gradient and reverts a proposal that does not help;
here every candidate's exact change is known from the maintained gradient, so the best one is taken and none reverted.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CHECK = 8  # steps between looks at which rows still move


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
    result, curvature = codes.clone(), scale.square() * proxy.diagonal()
    # a move must gain more than rounding noise, else two equal codes could be exchanged for ever
    noise = -32 * torch.finfo(codes.dtype).eps * curvature.amax(dim=1, keepdim=True)
    rows = torch.arange(codes.shape[0], device=codes.device)  # those that may still move
    state = [codes.clone(), 2 * error @ proxy, *bounds, scale, curvature, noise]
    for step in range(1, steps + 1):
        moved = _move_(proxy, *state)
        if step % CHECK == 0 or step == steps:  # rows at rest leave; asking at every step would stall a GPU
            result[rows] = state[0]
            moving = moved[:, 0].nonzero()[:, 0]
            if not len(moving):
                break
            if 2 * len(moving) <= len(rows):
                rows, state = rows[moving], [part[moving] for part in state]
    return result


def _move_(
    proxy: Float[Tensor, "n n"],
    codes: Float[Tensor, "r n"],
    gradient: Float[Tensor, "r n"],
    low: Float[Tensor, "r n"],
    high: Float[Tensor, "r n"],
    scale: Float[Tensor, "r n"],
    curvature: Float[Tensor, "r n"],
    noise: Float[Tensor, "r 1"],
) -> Float[Tensor, "r 1"]:
    """Each row's best move, written into codes and gradient; +1, -1, or 0 for a row at rest.

    A step against the slope changes the proxy by curvature - |slope|, one along it always raises it.
    """
    slope = scale * gradient
    blocked = torch.where(slope < 0, codes >= high, codes <= low)
    change, column = slope.abs().neg_().add_(curvature).masked_fill_(blocked, torch.inf).min(dim=1, keepdim=True)
    direction = torch.where(change < noise, -slope.gather(1, column).sign(), 0.0)
    codes.scatter_add_(1, column, direction)
    gradient.addcmul_(2 * direction * scale.gather(1, column), proxy[column[:, 0]])
    return direction
