"""Attention operands: seen once under their names on every route, replaced exactly, and never seen afterwards."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from dither.formats.activation import fit_activation
from dither.formats.spec import QuantSpec
from dither.nn.activation import ActivationQuantizer
from dither.nn.attention import (
    CHILD,
    OPERANDS,
    AttentionOperands,
    OperandMode,
    attend,
    operands_seen,
    quantize_attention,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(name: str, x: Tensor) -> Tensor:
    return x


class Seen:
    """An identity handler that remembers."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        self.names.append(name)
        self.tensors[name] = x
        return x


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
    return torch.matmul(functional.softmax(scores, dim=-1), value)


def by_operators(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ((query / math.sqrt(query.shape[-1])) @ key.mT).softmax(-1) @ value


def by_bmm(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)) * query.shape[-1] ** -0.5
    dropped = functional.dropout(torch.softmax(scores, -1), 0.1, training=False)
    return dropped.bmm(flat[2]).unflatten(0, query.shape[:2])


ROUTES: dict[str, Callable[..., Tensor]] = {
    "sdpa": functional.scaled_dot_product_attention,
    "eager": eager,
    "operators": by_operators,
    "bmm": by_bmm,
}
BOOLS = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
BOOLS[0] = False  # a row without any key
OPTIONS: list[dict[str, Any]] = [
    {},
    {"attn_mask": BOOLS},
    {"attn_mask": drawn(1, 5, 7, seed=4)},
    {"attn_mask": torch.zeros(5, 7, dtype=torch.float64).masked_fill(~BOOLS, -torch.inf)},
    {"is_causal": True},
    {"scale": 0.3},
    {"dropout_p": 0.0, "scale": 2.0, "attn_mask": drawn(2, 4, 5, 7, seed=4)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_the_fused_call_is_unchanged_by_handlers_that_change_nothing(options: dict[str, Any]) -> None:
    query, key, value = drawn(2, 4, 5, 8), drawn(2, 4, 7, 8, seed=1), drawn(2, 4, 7, 3, seed=2)
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    with OperandMode(same):
        found = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_queries_share_keys_that_are_seen_before_they_are_repeated(heads: int) -> None:
    query, key, value = drawn(2, 4, 5, 8), drawn(2, heads, 7, 8, seed=1), drawn(2, heads, 7, 8, seed=2)
    expected, seen = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True), Seen()
    with OperandMode(seen):
        found = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert seen.tensors["key"].shape == key.shape and seen.tensors["value"].shape == value.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_operands_do_not_overflow_and_keep_their_dtype(dtype: torch.dtype) -> None:
    query, key, value = (300 * drawn(1, 2, 5, 64).to(dtype) for _ in range(3))
    found = attend(same, query, key, value)
    expected = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert found.dtype == dtype and bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=2.0)


@pytest.mark.parametrize("route", ROUTES)
def test_each_operand_is_seen_once_in_order_and_alike_on_every_route(route: str) -> None:
    query, key, value, seen = drawn(2, 4, 5, 8), drawn(2, 4, 7, 8, seed=1), drawn(2, 4, 7, 3, seed=2), Seen()
    plain = ROUTES[route](query, key, value)
    with OperandMode(seen):
        found = ROUTES[route](query, key, value)
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)
    assert sorted(seen.names) == sorted(OPERANDS)
    factor = math.sqrt(8) if route == "operators" else 1.0  # that route scales its query first
    torch.testing.assert_close(factor * seen.tensors["query"].reshape(query.shape), query, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen.tensors["key"].reshape(key.shape), key)
    assert torch.equal(seen.tensors["value"].reshape(value.shape), value)
    expected = torch.softmax(query @ key.mT / math.sqrt(8), dim=-1)
    torch.testing.assert_close(seen.tensors["probabilities"].reshape(2, 4, 5, 7), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("operand", OPERANDS)
def test_what_a_handler_gives_back_is_what_is_computed_with(operand: str, route: str) -> None:
    parts = {"query": drawn(2, 4, 5, 8), "key": drawn(2, 4, 7, 8, seed=1), "value": drawn(2, 4, 7, 8, seed=2)}

    def changed(name: str, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4 if name == operand else x

    with OperandMode(changed):
        found = ROUTES[route](*parts.values())
    factor = math.sqrt(8) if route == "operators" and operand == "query" else 1.0
    if operand == "probabilities":
        expected = changed(operand, torch.softmax(parts["query"] @ parts["key"].mT / math.sqrt(8), -1)) @ parts["value"]
    else:
        parts[operand] = factor * changed(operand, parts[operand] / factor)
        expected = eager(*parts.values())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_products_with_weights_and_two_dimensional_products_are_no_attention() -> None:
    seen, x, weight = Seen(), drawn(2, 5, 8), nn.Parameter(drawn(2, 8, 8, seed=1))
    with OperandMode(seen):
        functional.linear(x, weight[0])
        x @ weight[0].T
        torch.bmm(x, weight)
        drawn(3, 4) @ drawn(4, 3)
    assert seen.names == []


def test_one_attention_after_the_other_starts_anew() -> None:
    query, key, value, seen = drawn(2, 4, 5, 8), drawn(2, 4, 5, 8, seed=1), drawn(2, 4, 5, 8, seed=2), Seen()
    with OperandMode(seen):
        eager(eager(query, key, value), key, value)
    assert seen.names == [*OPERANDS, *OPERANDS]


def test_probabilities_with_a_sink_are_seen_without_it() -> None:
    query, key, value, seen = drawn(2, 4, 5, 8), drawn(2, 4, 7, 8, seed=1), drawn(2, 4, 7, 3, seed=2), Seen()
    with OperandMode(seen):
        scores = torch.cat([query @ key.mT, torch.zeros(2, 4, 5, 1, dtype=torch.float64)], dim=-1)
        torch.softmax(scores, dim=-1)[..., :-1] @ value
    assert seen.names == list(OPERANDS)
    assert float(seen.tensors["probabilities"].sum(-1).max()) < 1


@pytest.mark.parametrize("stray", [(5, 3), (2, 6, 3)])
def test_a_softmax_that_is_no_attention_does_not_shift_the_names(stray: tuple[int, ...]) -> None:
    query, key, value, seen = drawn(2, 4, 5, 8), drawn(2, 4, 7, 8, seed=1), drawn(2, 4, 7, 3, seed=2), Seen()
    with OperandMode(seen):
        torch.softmax(drawn(*stray), dim=-1)  # as a router over experts
        eager(query, key, value)
    assert seen.names == list(OPERANDS)
    assert torch.equal(seen.tensors["query"], query) and torch.equal(seen.tensors["value"], value)


class Attention(nn.Module):
    """Self-attention as networks write it, on a chosen route."""

    def __init__(self, route: str = "sdpa") -> None:
        super().__init__()
        self.route = route
        self.qkv, self.out = nn.Linear(8, 24).double(), nn.Linear(8, 8).double()

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        if self.route == "broken":
            raise RuntimeError("broken on purpose")
        return self.out(ROUTES[self.route](*self.parts(x)).transpose(1, 2).flatten(2))


def attention(route: str = "sdpa") -> Attention:
    module = Attention(route)
    for seed, parameter in enumerate(module.parameters()):
        parameter.data.copy_(drawn(*parameter.shape, seed=seed))
    return module.requires_grad_(False)


def quantizers() -> dict[str, ActivationQuantizer]:
    spec, probabilities = QuantSpec.parse("int4:token:asym"), QuantSpec.parse("logsqrt2-4:tensor")
    fitted = ActivationQuantizer(probabilities).set((torch.tensor(1.0), torch.tensor(0.0)))
    return {name: fitted if name == "probabilities" else ActivationQuantizer(spec) for name in OPERANDS}


@pytest.mark.parametrize("names", [OPERANDS, ("query",), ("key", "value"), ("probabilities",), ()])
@pytest.mark.parametrize("route", ["sdpa", "eager", "bmm"])
def test_quantized_attention_quantizes_exactly_the_operands_it_was_given(route: str, names: tuple[str, ...]) -> None:
    module, x = attention(route), drawn(2, 5, 8, seed=9)
    chosen = {name: quantizer for name, quantizer in quantizers().items() if name in names}
    query, key, value = (
        chosen[name](part) if name in chosen else part
        for name, part in zip(("query", "key", "value"), module.parts(x), strict=True)
    )
    weights = torch.softmax(query @ key.mT / 2, dim=-1)
    weights = chosen["probabilities"](weights) if "probabilities" in chosen else weights
    expected = module.out((weights @ value).transpose(1, 2).flatten(2))
    quantize_attention(module, AttentionOperands(chosen))
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
    assert _get_current_function_mode_stack() == []


def test_quantizing_twice_replaces_the_first_operands() -> None:
    module, x = attention(), drawn(2, 5, 8, seed=9)
    quantize_attention(module, AttentionOperands(quantizers()))
    quantize_attention(module, AttentionOperands({"query": ActivationQuantizer(QuantSpec.parse("int2:token"))}))
    once = attention()
    quantize_attention(once, AttentionOperands({"query": ActivationQuantizer(QuantSpec.parse("int2:token"))}))
    assert torch.equal(module(x), once(x))
    assert len(module._forward_pre_hooks) == len(module._forward_hooks) == 1


def test_operands_are_part_of_the_state() -> None:
    module, other, x = attention(), attention(), drawn(2, 5, 8, seed=9)
    spec = QuantSpec.parse("int4:tensor:asym")
    fitted = ActivationQuantizer(spec).set(fit_activation(module.parts(x)[1].reshape(-1, 4), spec))
    quantize_attention(module, AttentionOperands({"key": fitted}))
    quantize_attention(other, AttentionOperands({"key": ActivationQuantizer(spec)}))
    assert f"{CHILD}.key.scale" in module.state_dict()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_a_deep_copy_has_operands_of_its_own() -> None:
    module, x = attention(), drawn(2, 5, 8, seed=9)
    spec = QuantSpec.parse("int4:tensor:asym")
    fitted = ActivationQuantizer(spec).set((torch.tensor(0.3), torch.tensor(8.0)))
    quantize_attention(module, AttentionOperands({"value": fitted}))
    plain, other = module(x), copy.deepcopy(module)
    assert torch.equal(other(x), plain)
    other.get_buffer(f"{CHILD}.value.scale").fill_(2.0)
    assert torch.equal(module(x), plain) and not torch.equal(other(x), plain)
    module.get_buffer(f"{CHILD}.value.scale").fill_(2.0)
    assert torch.equal(module(x), other(x))


def test_an_error_inside_leaves_no_mode_active() -> None:
    module, x = attention("broken"), drawn(2, 5, 8)
    quantize_attention(module, AttentionOperands(quantizers()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken on purpose"):
            module(x)
        assert _get_current_function_mode_stack() == []
    plain = attention("broken")
    with operands_seen(plain, same), pytest.raises(RuntimeError, match="broken on purpose"):
        plain(x)
    assert _get_current_function_mode_stack() == []
    module.route = "sdpa"
    assert bool(torch.isfinite(module(x)).all())


def test_a_hook_that_fails_before_the_attention_starts_does_no_harm() -> None:
    module = attention()

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("earlier hook")

    handle = module.register_forward_pre_hook(fail)
    with operands_seen(module, same), pytest.raises(ValueError, match="earlier hook"):
        module(drawn(2, 5, 8))
    handle.remove()
    assert _get_current_function_mode_stack() == []


def test_operands_are_seen_only_while_the_context_is_open_and_only_of_their_owner() -> None:
    first, second, seen = attention(), attention("eager"), Seen()
    model, x = nn.Sequential(first, second), drawn(2, 5, 8)
    plain = model(x)
    with operands_seen(second, seen):
        assert torch.equal(model(x), plain)
    assert sorted(seen.names) == sorted(OPERANDS)
    assert torch.equal(model(x), plain) and len(seen.names) == 4
    assert not second._forward_hooks and not second._forward_pre_hooks


def test_quantized_operands_can_be_observed_from_outside() -> None:
    module, x, seen = attention(), drawn(2, 5, 8), Seen()
    quantize_attention(module, AttentionOperands(quantizers()))
    plain = module(x)
    with operands_seen(module, seen):
        torch.testing.assert_close(module(x), plain, rtol=1e-9, atol=1e-9)
    assert _get_current_function_mode_stack() == []
