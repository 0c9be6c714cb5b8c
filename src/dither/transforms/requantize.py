"""From one scheme of quantized numbers to another, by what the source says of itself: ranges, scales, zero-points.

Everything is per cell: a row of a weight, or all of it. A symmetric target of b bits has the codes -2^(b-1)+1 …
2^(b-1)-1, and no zero-point.

Source: Kapur et al., MRQ: Support Multiple Quantization Schemes through Model Re-Quantization, arXiv 2308.01867 (its
weight correction and rounding error folding); formulas are ours, as only the abstract was at hand.
Departs from the abstract's words: what the correction minimizes and which means are folded is our choice, written at
each function.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

SHRINKS = tuple(1 - step / 100 for step in range(51))  # of the largest magnitude: our choice
SPREAD = 4.0  # standard deviations that the end of a calibrated range is taken to be: our choice


def highest(bits: int) -> int:
    """The largest code of a symmetric target."""
    return (1 << bits - 1) - 1


def power_above(scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The smallest power of two that is not below; exact, as it comes from the exponent of the number."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def weight_scale(
    weight: Float[Tensor, "n m"], bits: int, pow2: bool, importance: Float[Tensor, "n m"] | None
) -> Float[Tensor, " n"]:
    """A symmetric scale for each cell.

    With `importance` (E[x²] of each weight's input; ones where unknown) it is the candidate of least weighed squared
    error: 51 shrunken ranges, or the power of two at the largest magnitude and the two below. Without, the range holds
    the largest magnitude.
    """
    top = weight.abs().amax(dim=1).clamp_min(2.0**-60) / highest(bits)
    if importance is None:
        return power_above(top) if pow2 else top
    candidates = [power_above(top) * 2.0**-k for k in range(3)] if pow2 else [top * shrink for shrink in SHRINKS]
    errors = torch.stack(
        [(importance * (rounded(weight, scale, bits) - weight).square()).sum(dim=1) for scale in candidates]
    )
    best = errors.argmin(dim=0, keepdim=True)
    return torch.stack(candidates).gather(0, best)[0]


def weight_codes(weight: Float[Tensor, "n m"], scale: Float[Tensor, " n"], bits: int) -> Int[Tensor, "n m"]:
    """The nearest symmetric codes."""
    return (weight / scale[:, None]).round().clamp(-highest(bits), highest(bits)).to(torch.int8)


def rounded(weight: Float[Tensor, "n m"], scale: Float[Tensor, " n"], bits: int) -> Float[Tensor, "n m"]:
    """The values of the nearest codes."""
    return weight_codes(weight, scale, bits).to(weight.dtype) * scale[:, None]


def folded_bias(
    bias: Float[Tensor, " o"],
    weight: Float[Tensor, "o i"],
    stored: Float[Tensor, "o i"],
    mean: Float[Tensor, "#o i"],
    new_mean: Float[Tensor, "#o i"],
) -> Float[Tensor, " o"]:
    """The bias that keeps the mean output: B + W E[x] - W' E[x'], with x' what arrives in the target network.

    A grouped convolution's rows have means of their own. With x' = x this is B - (W' - W) E[x], the folding of the
    weights' rounding errors alone.
    """
    return bias + (weight * mean - stored * new_mean).sum(dim=1)


def activation_scale(low: float, high: float, bits: int, pow2: bool, unsigned: bool) -> float:
    """The scale of a target's activations for the range of the source.

    A power of two is the one above, or half of it where clipping the tail of a normal distribution, whose 4 standard
    deviations are the range, is expected to cost less than the finer step saves.
    """
    reach = high if unsigned else max(-low, high)
    steps = 2**bits - 1 if unsigned else highest(bits)
    exact = max(reach, 2.0**-60) / steps
    if not pow2:
        return exact
    above = float(power_above(torch.tensor(exact, dtype=torch.float64)))
    sigma = reach / SPREAD
    return min((above, above / 2), key=lambda scale: expected_error(scale, scale * steps, sigma))


def expected_error(scale: float, clip: float, sigma: float) -> float:
    """Mean squared error of rounding to `scale` and clipping at ±`clip` for values of N(0, sigma²).

    scale²/12 inside, and 2 sigma² ((1 + t²) Q(t) - t φ(t)) beyond, with t = clip / sigma.
    """
    if sigma <= 0:
        return scale**2 / 12
    t = clip / sigma
    beyond = math.erfc(t / math.sqrt(2)) / 2
    density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    return scale**2 / 12 * (1 - 2 * beyond) + 2 * sigma**2 * ((1 + t * t) * beyond - t * density)
