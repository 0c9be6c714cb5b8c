"""Gradients of layers, one sample at a time: equal to plain autograd's, and nothing of them stays behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import dither
from dither.errors import InputError, NonFiniteError
from dither.models.anatomy import read_anatomy
from dither.models.gradients import Gradients
from dither.models.network import open_network
from dither.statistics.gradients import Fisher, GradientGram


def opened(network: Any, batches: list[Any], **options: Any) -> tuple[Gradients, tuple[str, ...]]:
    run = open_network(network.model).run
    layers = read_anatomy(network.model, lambda: run(batches[0])).layers
    return Gradients(network.model, run, batches, **options), layers


def plain(model: nn.Module, ids: torch.Tensor, layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Autograd's own gradients of one sequence's mean next-token cross-entropy."""
    weights = [model.get_submodule(name).weight for name in layers]
    with torch.enable_grad():
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        found = torch.autograd.grad(loss, weights)
    return dict(zip(layers, found, strict=True))


def test_fisher_and_gram_are_sums_over_the_gradients_of_single_sequences(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    batches = [network.batch(3, seed=1), network.batch(2, seed=2)]
    gradients, layers = opened(network, batches)
    with torch.no_grad():
        fisher = gradients.accumulate(dict.fromkeys(layers, Fisher.of))
        gram = gradients.accumulate(dict.fromkeys(layers, GradientGram.of))
    samples = [plain(network.model, ids[None], layers) for batch in batches for ids in batch["input_ids"]]
    assert len(layers) > 10
    for name in layers:
        true = torch.stack([sample[name] for sample in samples]).double()
        torch.testing.assert_close(fisher[name].squares.double(), true.square().sum(0), rtol=1e-4, atol=1e-12)
        rows = sum(torch.outer(row, row) for sample in true for row in sample)
        torch.testing.assert_close(gram[name].gram.double(), rows, rtol=1e-3, atol=1e-9)
        assert fisher[name].samples == gram[name].samples == 5


def test_only_the_first_samples_count_where_fewer_are_asked_for(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    gradients, layers = opened(network, [network.batch(3), network.batch(3, seed=1)])
    few, _ = opened(network, [{"input_ids": network.batch(3)["input_ids"][:2]}])
    one, two = (g.accumulate(dict.fromkeys(layers, Fisher.of), n) for g, n in ((gradients, 2), (few, None)))
    assert all(torch.equal(one[name].squares, two[name].squares) for name in layers)
    assert gradients.count == 6


def test_a_tied_weight_gives_the_gradient_of_the_layers_own_use(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    model, batch = network.model, network.batch(1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gradients, _ = opened(network, [batch])
    found = gradients.of_sample(0, ["lm_head"], lambda name, gradient: gradient)["lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(found, plain(model, batch["input_ids"], ("lm_head",))["lm_head"])


def test_nothing_stays_behind_not_even_after_an_error(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    model = network.model
    model.model.norm.weight.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    gradients, layers = opened(network, [network.batch(2)])

    def fail(gradient: torch.Tensor) -> Fisher:
        raise NonFiniteError("stop")

    gradients.accumulate(dict.fromkeys(layers, Fisher.of))
    with pytest.raises(NonFiniteError, match="stop"):
        gradients.accumulate(dict.fromkeys(layers, fail))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())


def test_gradients_are_freed_as_they_arrive(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    gradients, layers = opened(network, [network.batch(1)])
    held: list[int] = []

    def count(name: str, gradient: torch.Tensor) -> None:
        held.append(sum(gradients.model.get_submodule(layer).weight.grad is not None for layer in layers))

    gradients.of_sample(0, layers, count)
    assert held == [0] * len(layers)


def test_a_convolution_gives_a_matrix_and_samples_of_any_nesting_are_cut(tiny: Callable[..., Any]) -> None:
    network = tiny("ConvNextForImageClassification")
    data = network.batch(3)
    forms: list[Any] = [data, {"pixel_values": data}, (data,)]
    found = []
    for form in forms:
        gradients, layers = opened(network, [form])
        assert gradients.count == 3
        found.append(gradients.accumulate(dict.fromkeys(layers, Fisher.of)))
    for name in found[0]:
        assert found[0][name].squares.shape == network.model.get_submodule(name).weight.flatten(1).shape
        assert torch.equal(found[0][name].squares, found[1][name].squares)
        assert torch.equal(found[0][name].squares, found[2][name].squares)


def test_a_layer_that_stores_its_weight_the_other_way_gives_the_same_matrix() -> None:
    from transformers.pytorch_utils import Conv1D

    linear, turned = nn.Linear(3, 3), Conv1D(3, 3)
    with torch.no_grad():
        turned.weight.copy_(linear.weight.T)
        turned.bias.copy_(linear.bias)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in (linear, turned):
        model = nn.Sequential(layer)
        found.append(Gradients(model, model, [x]).accumulate({"0": Fisher.of})["0"].squares)
    torch.testing.assert_close(found[0], found[1])


def test_half_precision_gradients_are_scaled_and_the_scale_divided_out(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    gradients, layers = opened(network, [network.batch(1)])
    true = gradients.of_sample(0, layers, lambda name, gradient: gradient)
    network.model.half()
    found = gradients.of_sample(0, layers, lambda name, gradient: gradient)
    for name in layers:
        assert found[name].dtype == torch.float32
        assert float((found[name] - true[name]).norm() / true[name].norm()) < 0.02


def test_a_layer_that_the_loss_does_not_reach_has_a_gradient_of_zeros() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.used(x)

    model = Two()
    gradients = Gradients(model, model, [torch.ones(2, 3)])
    found = gradients.accumulate({"used": Fisher.of, "unused": Fisher.of})
    assert not bool(found["unused"].squares.any())
    assert bool(found["used"].squares.any())
    assert found["unused"].samples == 2
    with pytest.raises(InputError, match="does not depend on unused"):
        gradients.accumulate({"unused": Fisher.of})


def test_what_is_not_finite_is_named(tiny: Callable[..., Any]) -> None:
    network = tiny("ViTForImageClassification")
    batch = network.batch(2)
    batch[1, 0, 0, 0] = torch.nan
    gradients, layers = opened(network, [batch])
    with pytest.raises(NonFiniteError, match=r"input of .*projection: activations hold \d+ NaN"):
        gradients.accumulate(dict.fromkeys(layers, Fisher.of))

    def broken(batch: Any, output: Any) -> torch.Tensor:
        return (output.logits * 0).sqrt().sum()

    gradients, _ = opened(network, [network.batch(1)], loss=broken)
    with pytest.raises(NonFiniteError, match=r"the gradient of .*\.weight holds NaN or Inf"):
        gradients.accumulate(dict.fromkeys(layers, Fisher.of))


def test_weights_that_are_not_in_memory_and_samples_that_are_not_there_are_refused(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    gradients, layers = opened(network, [network.batch(2)], resident=False)
    with pytest.raises(InputError, match="gradients need all weights in memory"):
        gradients.accumulate(dict.fromkeys(layers, Fisher.of))
    gradients, layers = opened(network, [network.batch(2)])
    with pytest.raises(InputError, match="sample 2 was asked for, the calibration data have 2"):
        gradients.of_sample(2, layers, lambda name, gradient: gradient)
    with pytest.raises(TypeError, match="not a layer in full precision"):
        gradients.weight("model.embed_tokens")


@pytest.mark.parametrize("name", ["squeezellm", "gwq", "oac"])
def test_a_method_that_takes_gradients_refuses_a_streamed_model_before_any_work(
    tiny: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    network = tiny("LlamaForCausalLM")
    network.model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=f"{name}: gradients need all weights in memory"):
        dither.quantize(tmp_path / "model", name, [network.batch(2)], output=tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()
