"""Logarithmic codes for values in [0, s], as softmax gives: log2 and log-sqrt2.

Source: log2 as in FQ-ViT; log-sqrt2 and its decoding by shift and parity as in RepQ-ViT (Li et al., ICCV 2023, arXiv
2212.08254).
Departs from the released code: there, values below the last code become 0 *beside* all 2^B codes, which makes 2^B + 1
levels. Here the top code means 0, so that B bits really hold every value.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.spec import QuantSpec


def encode_log(x: Float[Tensor, "*n"], scale: Float[Tensor, ""], spec: QuantSpec) -> Float[Tensor, "*n"]:
    """Codes as floats: k = round(-log(x / s)) to base 2 or sqrt 2; what is beyond the last power is 0, the top code."""
    steps = -torch.log2(x.clamp_min(0) / scale) * _per_octave(spec)
    return torch.round(steps).clamp(0, spec.levels - 1)


def decode_log(codes: Float[Tensor, "*n"], scale: Float[Tensor, ""], spec: QuantSpec) -> Float[Tensor, "*n"]:
    """Values of codes; for log-sqrt2 a shift by ceil(k/2) and one of two factors by parity."""
    if spec.kind == "log2":
        values = scale * torch.exp2(-codes)
    else:
        odd = codes.remainder(2)
        values = scale * torch.exp2(-torch.ceil(codes / 2)) * (1 + odd * (math.sqrt(2) - 1))
    return torch.where(codes == spec.levels - 1, torch.zeros_like(values), values)


def _per_octave(spec: QuantSpec) -> int:
    return 1 if spec.kind == "log2" else 2
