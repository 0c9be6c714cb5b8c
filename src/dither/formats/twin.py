"""Twin uniform codes: one bit chooses one of two ranges, each with its own step.

Source: PTQ4ViT (Yuan et al., ECCV 2022, arXiv 2111.12293). For softmax: a fine step below `split`, a coarse one above.
For GELU: one step for the negative side (split = 0), one for the positive.
Departs from the released code: a value takes the nearest level of either region, so that a larger value never comes out
smaller; there both regions are added up, which leaves an offset of about `split`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.spec import QuantSpec

Twin = Float[Tensor, " 3"]  # low step, high step, split


def encode_twin(x: Float[Tensor, "*n"], twin: Twin, spec: QuantSpec) -> Float[Tensor, "*n"]:
    """Codes as floats; those of the high region carry the top bit."""
    low, high, split = twin
    top = spec.levels // 2
    above = torch.round(x / high).clamp(0, top - 1)
    below = torch.round(x / _signed(low, split)).clamp(0, top - 1)
    nearer = (x - above * high).abs() < (x - below * _signed(low, split)).abs()
    return torch.where(nearer, above + top, below)


def decode_twin(codes: Float[Tensor, "*n"], twin: Twin, spec: QuantSpec) -> Float[Tensor, "*n"]:
    """Values of codes."""
    low, high, split = twin
    top = spec.levels // 2
    return torch.where(codes >= top, (codes - top) * high, codes * _signed(low, split))


def _signed(low: Float[Tensor, ""], split: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The low step counts downwards from zero when the regions meet at zero."""
    return torch.where(split > 0, low, -low)
