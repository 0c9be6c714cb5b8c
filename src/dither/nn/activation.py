"""Activation quantizers as modules."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import NonFiniteError
from dither.formats.activation import Scales, fake_quantize
from dither.formats.spec import QuantSpec
from dither.nn.buffers import FixedBuffers


class ActivationQuantizer(FixedBuffers):
    """Puts its input [..., d] on the grid of a format; a dynamic format measures its range at every call.

    An `offset` [d], kept in float16, is added before the input is rounded and stays in what comes out: the bias of the
    layer behind takes it back (`dither.calibrate.solve_and_store`). NoisyQuant's noisy bias is one, so is RepQuant's
    shift behind a norm without bias.
    """

    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None

    def __init__(self, spec: QuantSpec, channels: int = 1, offset: int = 0) -> None:
        """`channels` sizes the buffers of a per-channel format until `set` or a loaded state fills them.

        `offset` is that vector's length, 0 where there is none.
        """
        super().__init__()
        self.register_buffer("offset", torch.zeros(offset, dtype=torch.float16) if offset else None)
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

    def add(self, offset: Float[Tensor, " d"] | None) -> "ActivationQuantizer":
        """Take over an offset, rounded to float16; returns itself.

        Raises:
            NonFiniteError: it is too large for that.
        """
        self.offset = None if offset is None else offset.detach().to(torch.float16)
        if self.offset is not None and not bool(self.offset.isfinite().all()):
            raise NonFiniteError("the offset of an activation quantizer does not fit into float16")
        return self

    def copy(self) -> "ActivationQuantizer":
        """Another one with the same parameters, in memory of its own, as stored tensors must not be shared."""
        other = ActivationQuantizer(self.spec).add(None if self.offset is None else self.offset.clone())
        return other if self.spec.dynamic else other.set(self.scales)

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
        return fake_quantize(x, self.scales, self.spec, self.offset)

    def approximate(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """What stands for x in the layer's function: x on the grid, without the offset again."""
        out: Tensor = self(x)
        return out if self.offset is None else out - self.offset.to(out.dtype)

    def extra_repr(self) -> str:
        return str(self.spec) if self.offset is None else f"{self.spec}, offset={len(self.offset)}"


class _StraightThrough(torch.autograd.Function):
    """The quantizer forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
        return fake_quantize(x, quantizer.scales, quantizer.spec, quantizer.offset)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
