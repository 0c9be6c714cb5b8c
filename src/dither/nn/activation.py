"""Activation quantizers as modules."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dither.formats.activation import Scales, fake_quantize
from dither.formats.spec import QuantSpec
from dither.nn.buffers import FixedBuffers


class ActivationQuantizer(FixedBuffers):
    """Puts its input [..., d] on the grid of a format; a dynamic format measures its range at every call."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, channels: int = 1) -> None:
        """`channels` sizes the buffers of a per-channel format until `set` or a loaded state fills them."""
        super().__init__()
        self.spec = spec
        if not spec.dynamic:
            shape = (3,) if spec.kind == "twin" else (channels,) if spec.granularity == "channel" else ()
            zero_shape = () if spec.kind == "twin" else shape
            self.register_buffer("scale", torch.ones(shape))
            self.register_buffer("zero_point", torch.zeros(zero_shape))

    def set(self, scales: Scales) -> "ActivationQuantizer":
        """Take over fitted parameters; returns itself."""
        self.scale, self.zero_point = (part.detach().float().clone() for part in scales)
        return self

    @property
    def scales(self) -> Scales:
        """Scale and zero-point; both 1 and 0 for a dynamic format, which does not use them."""
        if self.spec.dynamic:
            return torch.ones(()), torch.zeros(())
        return self.scale, self.zero_point

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """x on the grid, in x's dtype; gradients pass as if it were x itself (straight-through)."""
        if torch.is_grad_enabled() and x.requires_grad:
            passed: Tensor = _StraightThrough.apply(x, self)  # type: ignore[no-untyped-call]
            return passed
        return fake_quantize(x, self.scales, self.spec)

    def extra_repr(self) -> str:
        return str(self.spec)


class _StraightThrough(torch.autograd.Function):
    """The quantizer forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
        return fake_quantize(x, quantizer.scales, quantizer.spec)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
