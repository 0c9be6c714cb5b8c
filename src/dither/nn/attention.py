"""Quantized operands of attention: query, key, probabilities and value.

Attention multiplies activations by activations inside a function call, so there is no layer to replace. While the
module that owns the attention runs, its calls of `scaled_dot_product_attention`, `softmax` and batched `matmul` are
seen by a torch function mode that hands each operand to a handler. This needs no knowledge of the architecture.
Not seen: products by `einsum` or `baddbmm`, and `torch.nn.MultiheadAttention`, which torch computes in one call.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dither.nn.activation import ActivationQuantizer

OPERANDS: Final = ("query", "key", "probabilities", "value")
CHILD: Final = "attention_operands"
Handler = Callable[[str, Tensor], Tensor]
_SDPA = functional.scaled_dot_product_attention
_SOFTMAX = {functional.softmax, torch.softmax, Tensor.softmax}
_MATMUL = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}


class OperandMode(TorchFunctionMode):
    """Passes every attention operand through `handler(name, tensor)` and computes with what comes back."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self._rows: int | None = None  # of probabilities that wait for their values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept the calls that attention is made of; everything else passes."""
        kwargs = kwargs or {}
        if func is _SDPA:
            return attend(self.handler, *args, **kwargs)
        if func in _MATMUL and _is_product_of_activations(args):
            args = (*self._operands(*args[:2]), *args[2:])
        result = func(*args, **kwargs)
        if func in _SOFTMAX and result.ndim >= 3:  # a router's softmax has two axes; its last may be cut (sinks)
            self._rows = result.shape[-2]
        return result

    def _operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if left.shape[-2] == self._rows:
            self._rows = None
            return self.handler("probabilities", left), self.handler("value", right)
        # the key arrives transposed; handlers see its channels on the last axis, as in the fused call
        return self.handler("query", left), self.handler("key", right.transpose(-2, -1)).transpose(-2, -1)


def _is_product_of_activations(args: tuple[Any, ...]) -> bool:
    tensors = [x for x in args[:2] if isinstance(x, Tensor) and x.ndim >= 3 and not isinstance(x, nn.Parameter)]
    return len(tensors) == 2


def attend(
    handler: Handler,
    query: Float[Tensor, "*b q d"],
    key: Float[Tensor, "*c k d"],
    value: Float[Tensor, "*c k e"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*b q e"]:
    """scaled_dot_product_attention with each operand handed to `handler`; dropout is for training and left out."""
    query, key, value = handler("query", query), handler("key", key), handler("value", value)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, dim=-3), value.repeat_interleave(repeats, dim=-3)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    masked = scores.amax(dim=-1, keepdim=True) == -torch.inf  # a row without any key gives zeros, as torch does
    probabilities = torch.softmax(scores, dim=-1).masked_fill(masked, 0.0).to(query.dtype)
    return handler("probabilities", probabilities) @ value


@contextmanager
def operands_seen(owner: nn.Module, handler: Handler) -> Iterator[None]:
    """While open, `handler` sees (and may replace) the operands of the attention that `owner` computes."""
    modes: list[ExitStack] = []

    def enter(module: nn.Module, args: Any) -> None:
        modes.append(_entered(handler))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if modes:  # empty where an earlier hook failed before `enter`
            modes.pop().close()

    handles = [owner.register_forward_pre_hook(enter), owner.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entered(handler: Handler) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(OperandMode(handler))
    return stack


class AttentionOperands(nn.Module):
    """The operand quantizers of one attention module, as its child `attention_operands`."""

    def __init__(self, quantizers: dict[str, ActivationQuantizer]) -> None:
        super().__init__()
        for name, quantizer in quantizers.items():
            self.add_module(name, quantizer)
        self._active: list[ExitStack] = []

    def quantize(self, name: str, x: Tensor) -> Tensor:
        """The operand on its grid, or as it is where no quantizer was set."""
        quantizer = self._modules.get(name)
        return x if quantizer is None else quantizer(x)

    def enter(self) -> None:
        """Start to see attention calls."""
        self._active.append(_entered(self.quantize))

    def leave(self) -> None:
        """Stop; a call that was under way when the quantizers were attached never started."""
        if self._active:
            self._active.pop().close()


def quantize_attention(owner: nn.Module, operands: AttentionOperands) -> None:
    """Let `owner` compute its attention with quantized operands from now on; a second call replaces the first one's."""
    hooked = CHILD in owner._modules
    owner.add_module(CHILD, operands)
    if not hooked:
        owner.register_forward_pre_hook(_enter)
        owner.register_forward_hook(_leave, always_call=True)


# free functions that find their state in the module they are called with, so that a deep copy has its own
def _enter(module: nn.Module, args: Any) -> None:
    _operands(module).enter()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    _operands(module).leave()


def _operands(module: nn.Module) -> AttentionOperands:
    child = module.get_submodule(CHILD)
    if not isinstance(child, AttentionOperands):
        raise TypeError(f"{CHILD} of {type(module).__name__} is a {type(child).__name__}")
    return child
