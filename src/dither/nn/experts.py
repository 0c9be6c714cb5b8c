"""Experts whose weights lie fused in three-dimensional parameters, taken apart into one layer for each matrix.

transformers keeps the experts of a layer as parameters [experts, o, i] (or [experts, i, o]) and multiplies them in one
call. `Experts` computes the same with a Linear for each expert, so that each is measured, quantized and stored alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
# what transformers' experts say of themselves (its `use_experts_implementation`)
_TRAITS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class ExpertLinear(nn.Linear):
    """A Linear of one expert: it sees the tokens that a router chose for it, which another model routes differently."""

    def __init__(self, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> None:
        """The parameters are views of those given."""
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]


class Experts(nn.Module):
    """What a module of fused experts computes, expert by expert.

    That module, without its matrices, still says how gates and activations work; it is hidden from `named_modules`, as
    transformers would miss its matrices. While `everyone` is set, an expert that no token was routed to is called with
    all tokens, and its output dropped.
    """

    def __init__(self, fused: nn.Module) -> None:
        """Takes the matrices out of `fused`."""
        super().__init__()
        self.everyone, self.width = False, int(fused.num_experts)  # type: ignore[arg-type]
        self.first = next(name for name in _UP if name in fused._parameters)
        for name in (self.first, _DOWN):
            self.add_module(name, nn.ModuleList(_matrices(fused, name)))
        for name, child in fused.named_children():
            self.add_module(name, child)
        self._rules = (fused,)

    def forward(
        self, hidden_states: Float[Tensor, "t d"], top_k_index: Int[Tensor, "t k"], top_k_weights: Float[Tensor, "t k"]
    ) -> Float[Tensor, "t d"]:
        """The sum of the chosen experts' outputs, each times its weight."""
        total = torch.zeros_like(hidden_states)
        for expert in range(self.width):
            token, place = torch.where(top_k_index == expert)
            if token.numel():
                found = self._expert(expert, hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, found.to(total.dtype))
            elif self.everyone:
                self._expert(expert, hidden_states)
        return total

    def _expert(self, expert: int, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        (rules,), up = self._rules, self.get_submodule(f"{self.first}.{expert}")(x)
        gated = rules._apply_gate(up) if rules.has_gate else rules.act_fn(up)  # type: ignore[operator]
        out: Tensor = self.get_submodule(f"{_DOWN}.{expert}")(gated)
        return rules.post_expert_norm(out) if rules.has_post_expert_norm else out  # type: ignore[operator]


def is_fused(module: nn.Module) -> bool:
    """Whether it is transformers' kind of fused experts, which `Experts` can take apart."""
    if not all(hasattr(module, trait) for trait in _TRAITS):
        return False
    if not hasattr(module, "_apply_gate" if module.has_gate else "act_fn"):
        return False
    stacks = [name for name in (*_UP, _DOWN) if module._parameters.get(name) is not None]
    known = {*stacks, *(f"{name}_bias" for name in stacks)} >= set(module._parameters)
    return known and len(stacks) == 2 and all(module.get_parameter(name).ndim == 3 for name in stacks)


def unfuse(model: nn.Module) -> list[str]:
    """Put `Experts` in the place of all fused experts of a model; returns their names."""
    names = [name for name, module in model.named_modules() if is_fused(module)]
    for name in names:
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, Experts(model.get_submodule(name)))
    return names


@contextmanager
def everyone_called(*models: nn.Module) -> Iterator[None]:
    """While open, every expert is called on every batch."""
    found = [module for model in models for module in model.modules() if isinstance(module, Experts)]
    for module in found:
        module.everyone = True
    try:
        yield
    finally:
        for module in found:
            module.everyone = False


def _matrices(fused: nn.Module, name: str) -> list[ExpertLinear]:
    weights = fused._parameters.pop(name)
    biases = fused._parameters.pop(f"{name}_bias", None)
    if weights is None:
        raise TypeError(f"{type(fused).__name__} has no {name}")
    stack = weights.detach().transpose(1, 2) if fused.is_transposed else weights.detach()
    return [ExpertLinear(stack[k], None if biases is None else biases.detach()[k]) for k in range(stack.shape[0])]
