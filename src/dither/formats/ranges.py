"""Ranges: which interval a grid covers, and the scale and zero-point that follow from it.

Every function works on cells [n, m]: n independent sets of m values that share one scale.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import SpecError
from dither.formats.grid import decode, encode, highest_code, implied_zero_point
from dither.formats.spec import QuantSpec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126}
EXPONENT_BIAS = 127  # of an exponent stored in 8 bits (E8M0)
_SHRINK_STEPS, _SHRINK_TO, _SHRINK_NORM = 80, 0.2, 2.4  # GPTQ released code: grid 100, maxshrink 0.8, norm 2.4

Bounds = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype in which scales (and real zero-points) are stored."""
    return _DTYPES[spec.scale_dtype]


def affine(low: Float[Tensor, " n"], high: Float[Tensor, " n"], spec: QuantSpec, stored: bool = True) -> Bounds:
    """Scale and zero-point of ranges; a range of zero width becomes one that holds its value and zero.

    `stored` rounds the scale to the spec's storage dtype first, so that the file holds what was used.

    Raises:
        SpecError: a scale or a real zero-point is too large for the storage dtype.
    """
    if spec.kind == "mxint":
        return _shared_exponent(torch.maximum(low.abs(), high.abs()), spec)
    low, high = opened(low, high, spec)
    if spec.symmetry == "asym":
        scale = (high - low) / highest_code(spec)
    elif spec.symmetry == "unsigned":
        scale = high / highest_code(spec)
    else:
        steps = 2 ** (spec.bits - 1) - 1 if spec.narrow else highest_code(spec) / 2
        scale = torch.maximum(low.abs(), high.abs()) / steps
    if spec.power_of_two:
        mantissa, exponent = torch.frexp(scale)  # exact on every device, which a logarithm is not
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    if stored:
        scale = _as_stored(scale, spec) if spec.symmetry != "sym" or spec.narrow else _as_stored_below(scale, spec)
    scale = scale.clamp_min(_SMALLEST[spec.scale_dtype if stored else "float32"])
    return scale, zero_points(low, scale, spec, stored)


def _shared_exponent(largest: Float[Tensor, " n"], spec: QuantSpec) -> Bounds:
    """Scale 2^e / 2^(b-2) with e = floor(log2(largest)), of the block floating point of QERA's MXINT.

    e stays where neither the scale nor its 8 stored bits underflow; a block of zeros has the smallest.
    """
    _, exponent = torch.frexp(largest)  # exact on every device, which a logarithm is not
    lowest = 1 - EXPONENT_BIAS + spec.bits - 2
    exponent = torch.where(largest > 0, exponent - 1, lowest).clamp_min(lowest)
    scale = torch.ldexp(torch.ones_like(largest), exponent - (spec.bits - 2))
    return scale, torch.full_like(scale, implied_zero_point(spec))


def stored_scale(scale: Float[Tensor, "*n"], spec: QuantSpec) -> Float[Tensor, "*n"]:
    """Scales rounded to their storage dtype, none of them zero.

    Raises:
        SpecError: a scale is too large for it.
    """
    return _as_stored(scale, spec).clamp_min(_SMALLEST[spec.scale_dtype])


def _as_stored(part: Float[Tensor, "*n"], spec: QuantSpec) -> Float[Tensor, "*n"]:
    rounded = part.to(scale_dtype(spec)).to(part.dtype)
    if bool((rounded.isinf() & part.isfinite()).any()):
        raise SpecError(
            f"{spec}: a scale or zero-point of {float(part.abs().amax()):.4g} does not fit into {spec.scale_dtype}; "
            "use scale_dtype float32 or, for a zero-point, a range with zero in it (zeroin)"
        )
    return rounded


def _as_stored_below(scale: Float[Tensor, "*n"], spec: QuantSpec) -> Float[Tensor, "*n"]:
    """Scales of symmetric ranges, rounded to their storage dtype but never up.

    The largest weight of a cell lies half a step beyond the codes on one side and between two codes on the other. There
    it always gets the outer code then, as with an exact scale; to nearest, every second cell would leave it unused.
    """
    rounded = _as_stored(scale, spec)
    if spec.scale_dtype == "float32":
        return rounded
    before = (rounded.to(scale_dtype(spec)).view(torch.int16) - 1).view(scale_dtype(spec)).to(scale.dtype)
    return torch.where((rounded > scale) & (rounded > _SMALLEST[spec.scale_dtype]), before, rounded)


def zero_points(
    low: Float[Tensor, "*n"], scale: Float[Tensor, "*n"], spec: QuantSpec, stored: bool = True
) -> Float[Tensor, "*n"]:
    """The zero-points that go with scales and the lower ends of `opened` ranges.

    Raises:
        SpecError: a real zero-point is too large for the storage dtype.
    """
    if spec.symmetry != "asym":
        return torch.full_like(scale, implied_zero_point(spec))
    zero_point = -low / scale
    if spec.zero_point == "real":
        return _as_stored(zero_point, spec) if stored else zero_point
    zero_point = torch.round(zero_point)
    # with zero in range rounding of the scale must not push the zero-point out of the codes
    return zero_point.clamp(0, highest_code(spec)) if spec.include_zero or spec.zero_point == "clamped" else zero_point


def opened(low: Float[Tensor, " n"], high: Float[Tensor, " n"], spec: QuantSpec) -> Bounds:
    """The range that a grid covers: with zero in it where the spec wants that, and never of zero width."""
    if spec.include_zero or spec.symmetry != "asym":
        low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetry == "unsigned":
        low = torch.zeros_like(low)
    flat = high - low <= 0
    low = torch.where(flat, low.clamp(max=0), low)
    high = torch.where(flat, high.clamp(min=0), high)
    empty = high - low <= 0  # all zero, or only negative under an unsigned grid
    if spec.symmetry == "unsigned":
        return low, torch.where(empty, torch.ones_like(high), high)
    # zeros must stay zeros: between -1 and 1 a real zero-point would fall between two codes
    floor = torch.full_like(low, 0.0 if spec.zero_point == "real" else -1.0)
    return torch.where(empty, floor, low), torch.where(empty, torch.ones_like(high), high)


def search_range(
    cells: Float[Tensor, "n m"],
    spec: QuantSpec,
    stored: bool = True,
    importance: Float[Tensor, "n m"] | None = None,
) -> Bounds:
    """Low and high of each cell: its extremes, or the candidate of least squared error (of norm 2.4 for `mse`).

    `stored` as in `affine`, so that candidates are judged by the scales that will be used; `importance` weighs the
    error of each value.
    """
    low, high = cells.amin(dim=1), cells.amax(dim=1)
    if spec.search == "minmax":
        return low, high
    if spec.search == "percentile":
        lows, highs = quantiles(cells, [1 - p for p in spec.percentiles]), quantiles(cells, spec.percentiles)
        candidates = list(zip(lows, highs, strict=True))
        return _least_error(cells, candidates, spec, 2.0, stored, importance)
    shrinks = [1 - step * (1 - _SHRINK_TO) / _SHRINK_STEPS for step in range(_SHRINK_STEPS)]
    return _least_error(cells, [(low * p, high * p) for p in shrinks], spec, _SHRINK_NORM, stored, importance)


def _least_error(
    cells: Float[Tensor, "n m"],
    candidates: list[Bounds],
    spec: QuantSpec,
    norm: float,
    stored: bool,
    importance: Float[Tensor, "n m"] | None,
) -> Bounds:
    best_low, best_high = (bound.clone() for bound in candidates[0])
    best = torch.full_like(best_low, torch.inf)
    for low, high in candidates:
        scale, zero_point = (part[:, None] for part in affine(low, high, spec, stored))
        error = decode(encode(cells, scale, zero_point, spec), scale, zero_point).sub_(cells).abs_().pow_(norm)
        total = error.mean(1) if importance is None else error.mul_(importance).mean(1)
        better = total < best
        best = torch.where(better, total, best)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high


def quantiles(cells: Float[Tensor, "n m"], shares: Sequence[float]) -> list[Float[Tensor, " n"]]:
    """Quantiles of each cell, interpolated linearly; all shares on one side of the median.

    torch.quantile refuses more than 16 M values and sorts them all; here only the tail that is asked for is ordered.
    """
    last, upper = cells.shape[1] - 1, min(shares) >= 0.5
    places = [p * last for p in shares]
    depth = 2 + int(max(last - place for place in places) if upper else max(places))
    tail = cells.topk(min(depth, last + 1), dim=1, largest=upper).values
    found = []
    for place in places:
        ends = (min(int(place), last), min(int(place) + 1, last))
        below, above = (tail[:, last - end if upper else end] for end in ends)
        found.append(torch.lerp(below, above, place - int(place)))
    return found
