"""Bits for the columns of a matrix, or of many, whose losses fall as c 4^-R with the bits R that a column has.

Source: BAQ: Efficient Bit Allocation Quantization for Large Language Models, arXiv 2506.05664: at the optimum of an
average rate all columns lose the same, R_j = mean + ½ log2(c_j / geometric mean), and the loss is GM / AM of that at
equal bits.
Departs from the released code: columns that would get less than no bit drop out and the others share what they leave
(reverse water-filling), where the code clamps and misses its average; columns of no loss have no bits; whole bits add
up to the budget exactly; many matrices can share one budget, a bit of a column then costs its rows.
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.errors import InputError

CAP = 8.0  # bits of a column at most; beyond about 10 the released code's columns are corrupted
_HALVINGS = 100  # of an interval of some hundred bits: ends at the precision of float64


def equal_loss_bits(
    loss: Float[Tensor, " n"], average: float, cost: Float[Tensor, " n"] | None = None, cap: float = CAP
) -> Float[Tensor, " n"]:
    """Fractional bits R of least Σ loss 4^-R with Σ cost R = average Σ cost and 0 ≤ R ≤ cap, in float64.

    Columns of no loss have no bits. If the others cannot take the whole budget, all of them have `cap`.

    Raises:
        InputError: a loss is negative or not finite, or the average is not between 0 and `cap`.
    """
    wide, weigh = loss.double(), torch.ones_like(loss).double() if cost is None else cost.double()
    if not bool(torch.isfinite(wide).all()) or bool((wide < 0).any()):
        raise InputError("bits by loss: expected finite losses of at least 0")
    if not 0 <= average <= cap:
        raise InputError(f"bits by loss: expected an average between 0 and {cap:g}, got {average:g}")
    live = wide > 0
    ideal = torch.full_like(wide, -torch.inf)
    ideal[live] = torch.log2(wide[live] / weigh[live]) / 2  # up to the water level, which is the same for all
    budget = average * float(weigh.sum())
    if not bool(live.any()) or budget >= cap * float(weigh[live].sum()):
        return torch.where(live, cap, 0.0).to(wide)
    low, high = float(ideal[live].amin()) - cap, float(ideal[live].amax())
    for _ in range(_HALVINGS):
        level = (low + high) / 2
        used = float((weigh * (ideal - level).clamp(0, cap)).sum())
        low, high = (level, high) if used > budget else (low, level)
    return (ideal - high).clamp(0, cap)


def levels_of_bits(bits: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Whole numbers of levels nearest to 2^bits, at least one: the paper's columns, whose bits are fractions."""
    return torch.round(2.0**bits).long().clamp_min(1)


def gain(loss: Float[Tensor, " n"], bits: Float[Tensor, " n"]) -> float:
    """Σ loss 4^-bits over what the same bits lose when all columns have the mean; GM / AM at the optimum."""
    uniform = float(loss.double().sum()) * 4.0 ** -float(bits.double().mean())
    return float((loss.double() * 4.0 ** -bits.double()).sum()) / uniform if uniform > 0 else 1.0


def losses_at(loss: Float[Tensor, " n"], widths: int = 8) -> Float[Tensor, "n b"]:
    """The table loss 4^-b of 0, 1, … `widths` bits."""
    return loss.double()[:, None] * 4.0 ** -torch.arange(widths + 1, dtype=torch.float64, device=loss.device)


def whole_bits(losses: Float[Tensor, "n b"], total: int, allowed: Collection[int] | None = None) -> Int[Tensor, " n"]:
    """Bits b of each column, of low Σ losses[j, b], that add up to `total`, or to the most below it that is allowed.

    Bits go where the lower convex hull of a column's losses falls most, which is the optimum for convex losses; what is
    left within the last hull step goes to the best single steps. `allowed` names the widths that there are. Columns
    whose losses are all zero have the least.

    Raises:
        InputError: even the least widths take more than `total`.
    """
    widths = sorted(set(range(losses.shape[1])) & set(range(losses.shape[1]) if allowed is None else allowed))
    if not widths or total < widths[0] * len(losses):
        least = widths[0] * len(losses) if widths else 0
        raise InputError(f"bits of {len(losses)} columns: at least {least} of widths {widths}, got {total}")
    table = losses.double()
    slopes = _hull(table, widths)
    count, wanted = slopes.shape[1], min(total - widths[0] * len(losses), int((slopes > 0).sum()))
    order = torch.argsort(slopes.flatten(), descending=True, stable=True)  # the bits of a hull step side by side
    bits = widths[0] + torch.bincount(order[:wanted] // count, minlength=len(losses)) if count else None
    if bits is None:
        return torch.full((len(losses),), widths[0], device=losses.device)
    if 0 < wanted < len(order):
        last, after = order[wanted - 1], order[wanted]
        row, slope = last // count, slopes.flatten()[last]
        if row == after // count and slope == slopes.flatten()[after]:  # the only one that ends within a step
            bits[row] -= int((slopes[row, : int(bits[row]) - widths[0]] == slope).sum())
    return _filled(table, bits, total, widths)


def _hull(table: Float[Tensor, "n b"], widths: Sequence[int]) -> Float[Tensor, "n s"]:
    """How fast the lower convex hull over `widths` falls at each bit, from the least width on; never rising.

    It is the antitonic regression of the falls: min over starts, max over ends of the mean fall between.
    """
    slopes = table.new_zeros(len(table), widths[-1] - widths[0])
    for bit in range(widths[0], widths[-1]):
        best = torch.full_like(table[:, 0], torch.inf)
        for start in (w for w in widths if w <= bit):
            ends = [w for w in widths if w > bit]
            falls = torch.stack([(table[:, start] - table[:, end]) / (end - start) for end in ends])
            best = torch.minimum(best, falls.amax(dim=0))
        slopes[:, bit - widths[0]] = best
    return slopes


def _filled(
    table: Float[Tensor, "n b"], bits: Int[Tensor, " n"], total: int, widths: Sequence[int]
) -> Int[Tensor, " n"]:
    """Spend what is left of `total` on the upgrade of largest fall per bit that fits, again and again."""
    bits, left = bits.clone(), total - int(bits.sum())
    while left > 0:
        best, where, width = 0.0, -1, -1
        for end in widths:
            extra = end - bits
            fall = (table.gather(1, bits[:, None])[:, 0] - table[:, end]) / extra.clamp_min(1)
            fall = torch.where((extra > 0) & (extra <= left), fall, torch.zeros_like(fall))
            value, place = fall.max(dim=0)
            if float(value) > best:
                best, where, width = float(value), int(place), end
        if where < 0:
            return bits
        left -= width - int(bits[where])
        bits[where] = width
    return bits
