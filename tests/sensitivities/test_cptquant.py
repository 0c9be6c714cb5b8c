"""CPTQuant's sensitivities: by their definitions, with the right sign, and without the released code's faults."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dither.allocating import allocate
from dither.models.losses import class_rows
from dither.sensitivities.cmpq import CMPQ, pooled
from dither.sensitivities.pmpq import PMPQ, without_smallest
from dither.sensitivities.tdmpq import TDMPQ, disturbed
from dither.sensitivity import measure
from dither.statistics.divergence import kl_rows

FORMATS = ["int2:channel:asym:minmax", "int4:channel:asym:minmax", "none"]


@pytest.fixture(name="probed")
def probed_network(odd: Callable[..., Any]) -> Callable[..., tuple[Any, Any, Any]]:
    def make(sensitivity: Any, options: Any = FORMATS, depth: int = 2) -> tuple[Any, Any, Any]:
        network = odd(depth=depth)
        data = network.batch(12, seed=1)
        return network, data, measure(network.model, sensitivity, [data[:5], data[5:]], options=options)

    return make


def divergence(network: Any, data: Any, wanted: Any) -> float:
    with torch.no_grad():
        return float(kl_rows(wanted, class_rows(network.model(data))).double().mean())


def test_pruning_damage_is_the_divergence_without_the_smallest_weights_of_a_block(probed: Any) -> None:
    network, data, table = probed(PMPQ())
    with torch.no_grad():
        wanted = class_rows(network.model(data))
        for parameter in network.model.blocks[1].parameters():
            parameter.copy_(without_smallest(parameter, 0.3))
    expected = divergence(network, data, wanted)
    assert table.facts["blocks"]["blocks.1"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0


@pytest.mark.parametrize("shape", [(10,), (7, 3), (2, 3, 5)])
def test_exactly_the_smallest_share_is_cut(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cut = without_smallest(values, 0.3)
    gone = cut == 0
    assert int(gone.sum()) == int(0.3 * values.numel())
    assert float(values[gone].abs().max()) <= float(values[~gone].abs().min())
    assert torch.equal(cut[~gone], values[~gone])


@pytest.mark.parametrize(("less", "more"), [(PMPQ(0.1), PMPQ(0.6)), (TDMPQ(0.01), TDMPQ(0.1))])
def test_more_noise_is_more_damage_in_every_block(less: Any, more: Any, probed: Any) -> None:
    one, two = (
        probed(less, FORMATS[:1], depth=1)[2].facts["blocks"],
        probed(more, FORMATS[:1], depth=1)[2].facts["blocks"],
    )
    assert all(two[name] > one[name] > 0 for name in one)


def test_small_noise_does_damage_as_its_square_and_draws_differ(probed: Any) -> None:
    one, two = (probed(TDMPQ(size, draws=3), FORMATS[:1], depth=1)[2].facts for size in (0.01, 0.02))
    for name in one["blocks"]:
        assert two["blocks"][name] / one["blocks"][name] == pytest.approx(4, rel=0.2)
        assert len(set(one["draws"][name])) == 3
    weight = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)) * 3
    moved = disturbed(weight, 0.01, torch.Generator().manual_seed(1)) - weight
    assert float(moved.std()) == pytest.approx(0.03, rel=0.05)


def test_the_first_order_is_the_gradient_along_the_error_of_each_option(probed: Any) -> None:
    _, _, table = probed(TDMPQ(first_order=True))
    assert (table.scores[:, 0] > 0).all() and (table.scores[:, 2] == 0).all()
    assert (table.scores[:, 0] > table.scores[:, 1]).mean() > 0.7


def test_correlations_are_of_each_blocks_own_output_and_padding_does_not_count() -> None:
    output, mask = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pooled(output, mask).flatten().tolist() == [2, 4]
    assert pooled(torch.ones(2, 3, 4, 4), None).shape == (2, 3)


def test_a_block_that_computes_something_else_is_more_sensitive(odd: Callable[..., Any]) -> None:
    """Blocks that add next to nothing hold what the others hold; one that replaces it does not."""
    network = odd(depth=4)
    with torch.no_grad():
        for number, block in enumerate(network.model.blocks):
            for layer in (block.proj, block.fc2):
                layer.weight.mul_(0.01 if number != 3 else 30.0)
    table = measure(network.model, CMPQ(), [network.batch(60)], options=FORMATS)
    scores = table.facts["blocks"]
    assert scores["blocks.3"] == max(scores[f"blocks.{number}"] for number in range(4))
    assert all(0 <= score <= 1 for score in scores.values())


@pytest.mark.parametrize("by", ["cmpq", "pmpq", "tdmpq", "pmpq-clusters", "cmpq-clusters"])
def test_blocks_of_like_sensitivity_share_bits_within_the_budget(by: str, odd: Callable[..., Any]) -> None:
    network = odd(depth=3)
    found = allocate(
        network.model, [network.batch(12)], bits=5.9, by=by, options=["int2:channel", "int4:channel", "int8:channel"]
    )
    assert found.bits <= 5.9
    if by.endswith("clusters"):
        blocks = [{str(found.layers[f"blocks.{n}.{layer}"]) for layer in ("qkv", "fc1")} for n in range(3)]
        assert all(len(options) == 1 for options in blocks)


def test_probed_blocks_are_put_back_and_their_outputs_did_change(probed: Any) -> None:
    """Nested modules are reached (the released code replaced a dotted attribute of the root instead)."""
    network, data, table = probed(PMPQ(0.9))
    again = probed(PMPQ(0.9))[2]
    np.testing.assert_array_equal(table.scores, again.scores)
    assert min(table.facts["blocks"].values()) > 1e-4
    assert isinstance(network.model.blocks[0].fc1, nn.Linear) and len(data) == 12
