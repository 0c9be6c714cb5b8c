"""Folds keep what a block puts out, in both of its networks, or are undone."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dither.folding import fold_chain, fold_link, on_trial
from dither.models.anatomy import read_anatomy
from dither.models.links import Chain, Link, first_tensor
from dither.models.network import Network
from dither.transforms.equalize import equalization
from dither.walk import Block, walk


def visit(network: Any, batches: list[Any]) -> Iterator[Block]:
    run = Network(network.model, "tiny").run
    anatomy = read_anatomy(network.model, lambda: run(batches[0]))
    with torch.no_grad():
        yield from walk(network.model, anatomy, run, batches, "fp")


def scale(size: int) -> torch.Tensor:
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification"])
def test_scales_folded_into_norms_and_layers_keep_the_output(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name, num_hidden_layers=1)
    for block in visit(network, [network.batch(3)]):
        if not block.unit.is_block:
            continue
        before, links, chains = first_tensor(block.once()), block.links().found, block.chains()
        for link in links:
            assert fold_link(block, link, equalization(scale(32)))
        for chain in chains:
            assert fold_chain(block, chain, scale(block.weight(chain.source).shape[0]))
        assert len(links) == 2
        assert chains
        after = first_tensor(block.once())
        assert float((after - before).norm() / before.norm()) < 1e-5
        for one, two in zip(block.module.parameters(), block.reference.parameters(), strict=True):
            assert torch.equal(one, two)


def test_a_fold_that_changes_the_output_is_undone(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", num_hidden_layers=1)
    for block in visit(network, [network.batch(3)]):
        if not block.unit.is_block:
            continue
        before = [p.clone() for p in (*block.module.parameters(), *block.reference.parameters())]
        base = block.unit.name
        link = Link(f"{base}.input_layernorm", (f"{base}.self_attn.q_proj",))
        chain = Chain(f"{base}.mlp.gate_proj", (f"{base}.mlp.down_proj",))
        assert not fold_link(block, link, equalization(scale(32)))
        assert not fold_chain(block, chain, scale(48))
        after = (*block.module.parameters(), *block.reference.parameters())
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_weights_on_trial_are_gone_afterwards(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    for block in visit(network, [network.batch(3)]):
        if not block.unit.is_block:
            continue
        name = f"{block.unit.name}.fc1"
        before, weight = first_tensor(block.once()), block.weight(name).clone()
        with on_trial(block, {name: weight * 2}):
            assert not torch.allclose(first_tensor(block.once()), before)
        assert torch.equal(first_tensor(block.once()), before)
        assert torch.equal(block.weight(name), weight)
