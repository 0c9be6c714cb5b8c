"""The losses whose gradients are taken."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from dither.errors import InputError
from dither.models.losses import natural_loss, next_token_loss, own_prediction_loss


def test_the_loss_of_a_language_model_is_the_one_transformers_computes(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    batch = network.batch(2)
    assert natural_loss(network.model) is next_token_loss
    expected = network.model(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(next_token_loss(batch, network.model(**batch)), expected)


def test_padding_does_not_count() -> None:
    ids, logits = torch.tensor([[1, 2, 3, 0]]), torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0]])
    found = next_token_loss({"input_ids": ids, "attention_mask": mask}, SimpleNamespace(logits=logits))
    torch.testing.assert_close(found, functional.cross_entropy(logits[0, :2], ids[0, 1:3]))


def test_other_models_are_asked_how_sure_they_are_of_what_they_say(tiny: Callable[..., Any]) -> None:
    network = tiny("ViTForImageClassification")
    assert natural_loss(network.model) is own_prediction_loss
    logits = network.logits(network.batch(3))
    expected = -logits.log_softmax(1).amax(1).mean()
    torch.testing.assert_close(own_prediction_loss(None, network.model(network.batch(3))), expected)


def test_classes_of_maps_lie_along_the_second_axis_and_a_tuple_gives_its_first_part() -> None:
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = -logits.log_softmax(1).amax(1).mean()
    torch.testing.assert_close(own_prediction_loss(None, (logits, None)), expected)


def test_what_gives_no_loss_is_refused() -> None:
    with pytest.raises(InputError, match="needs batches of input_ids"):
        next_token_loss(torch.ones(1, 3), SimpleNamespace(logits=torch.ones(1, 3, 4)))
    with pytest.raises(InputError, match="at least 2 tokens"):
        next_token_loss({"input_ids": torch.ones(1, 1, dtype=torch.long)}, SimpleNamespace(logits=torch.ones(1, 1, 4)))
    with pytest.raises(InputError, match="returns logits, got str"):
        own_prediction_loss(None, "a text")
