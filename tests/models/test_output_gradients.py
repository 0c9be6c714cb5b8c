"""Rows with squared gradients of outputs: equal to autograd's, cut by sample, and what their mean is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dither.draws import generator_of
from dither.errors import InputError
from dither.models.gradients import Gradients
from dither.models.losses import drawn_prediction_loss, own_prediction_loss, self_divergence_loss
from dither.models.network import Network
from dither.models.output_gradients import output_rows


def gradients(network: Any, batches: list[Any], **settings: Any) -> Gradients:
    return Gradients(network.model, Network(network.model, "tiny").run, batches, **settings)


def test_rows_and_squares_are_those_of_autograd(odd: Callable[..., Any]) -> None:
    network, name = odd(depth=1), "blocks.0.fc1"
    batch = network.batch(1)
    found = output_rows(gradients(network, [batch]), ["stem", name, "head"], 100, own_prediction_loss)
    kept: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        output.retain_grad()
        kept["x"], kept["y"] = args[0].detach(), output

    handle = network.model.get_submodule(name).register_forward_hook(keep)
    with torch.enable_grad():
        own_prediction_loss(batch, network.model(batch)).backward()
    handle.remove()
    assert torch.equal(found[name].inputs, kept["x"].flatten(0, -2))
    weighing = found[name].weighing
    assert weighing is not None
    torch.testing.assert_close(weighing, kept["y"].grad.flatten(0, -2).square(), rtol=1e-4, atol=1e-12)
    assert {key: len(rows.inputs) for key, rows in found.items()} == {"stem": 6, name: 6, "head": 1}
    assert all(parameter.requires_grad for parameter in network.model.parameters())


def test_batches_are_only_a_way_to_cut_the_samples_and_rows_are_spread_over_all(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    data = network.batch(5)
    whole, cut = (
        output_rows(gradients(network, parts), ["blocks.0.qkv"], 10, own_prediction_loss)["blocks.0.qkv"]
        for parts in ([data], list(data.split(2)))
    )
    assert len(whole.inputs) == 10  # two of the six rows of each sample
    assert torch.equal(whole.inputs, cut.inputs)
    assert whole.weighing is not None and cut.weighing is not None
    torch.testing.assert_close(whole.weighing, cut.weighing)


def test_drawn_labels_give_the_hessian_of_the_divergence_and_the_divergence_itself_gives_nothing(
    odd: Callable[..., Any],
) -> None:
    network = odd(depth=1)
    batch = network.batch(1)
    draws = [batch] * 300
    drawn = output_rows(gradients(network, draws), ["head"], 300, drawn_prediction_loss(generator_of("x")))["head"]
    with torch.no_grad():
        chances = network.model(batch).softmax(-1)[0]
    assert drawn.weighing is not None
    # the head's output is the logits, whose Hessian diag(p) - p pᵀ is
    torch.testing.assert_close(drawn.weighing.mean(dim=0), chances * (1 - chances), rtol=0.2, atol=0.03)
    nothing = output_rows(gradients(network, [batch]), ["head"], 1, self_divergence_loss)["head"]
    assert nothing.weighing is not None and float(nothing.weighing.max()) < 1e-12


@pytest.mark.parametrize(
    "name", ["ConvNextForImageClassification", "MixtralForCausalLM", "SegformerForImageClassification"]
)
def test_convolutions_experts_and_grouped_layers_are_measured_or_left_out(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    known = gradients(network, [network.batch(2)])
    layers = [key for key, module in network.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = output_rows(known, layers, 20, own_prediction_loss)
    for key in layers:
        layer = network.model.get_submodule(key)
        if getattr(layer, "groups", 1) > 1:
            assert key not in found
        elif key in found:
            rows = found[key]
            assert rows.weighing is not None
            assert rows.inputs.shape[1] == layer.weight[0].numel()
            assert rows.weighing.shape == (len(rows.inputs), layer.weight.shape[0])
    assert len(found) > len(layers) / 2


def test_a_model_that_is_read_block_by_block_is_refused(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    with pytest.raises(InputError, match="read block by block"):
        output_rows(gradients(network, [network.batch(1)], resident=False), ["head"], 1, own_prediction_loss)
