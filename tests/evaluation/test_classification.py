"""Evaluation of a classifier: what is run, what is left as it was, and what is reported."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dither.data import class_ids, load_processor, open_images
from dither.errors import InputError, NonFiniteError
from dither.evaluation import Evaluation, evaluate_classifier, predict


class Mean(nn.Module):
    """Logits are the channels' means; dropout tells whether the model is in evaluation mode."""

    def __init__(self, wrap: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.9)
        self.wrap = wrap

    def forward(self, pixels: Tensor) -> Tensor | SimpleNamespace:
        logits = self.dropout(pixels.mean(dim=(2, 3)) * self.scale)
        return SimpleNamespace(logits=logits) if self.wrap else logits


def pictures(count: int = 5) -> Tensor:
    return torch.eye(3)[torch.arange(count) % 3][:, :, None, None].expand(count, 3, 2, 2)


@pytest.mark.parametrize("wrap", [False, True])
def test_logits_of_all_batches_come_back_in_order_without_gradient(wrap: bool) -> None:
    logits = predict(Mean(wrap), pictures().split(2))
    torch.testing.assert_close(logits, torch.eye(3)[[0, 1, 2, 0, 1]], rtol=0, atol=0)
    assert not logits.requires_grad


def test_each_module_gets_its_own_mode_back_even_after_an_error() -> None:
    model = Mean().train()
    model.dropout.eval()
    with pytest.raises(InputError):
        predict(model, [])
    predict(model, [pictures()])
    assert model.training
    assert not model.dropout.training


def test_a_half_precision_model_gets_its_own_dtype_and_gives_float32() -> None:
    assert predict(Mean().to(torch.bfloat16), [pictures()]).dtype == torch.float32


def test_progress_counts_pictures() -> None:
    seen: list[int] = []
    predict(Mean(), pictures().split(2), progress=seen.append)
    assert seen == [2, 4, 5]


@pytest.mark.parametrize("output", ["text", torch.zeros(2, 3, 4), SimpleNamespace(logits=None)])
def test_a_model_that_returns_no_logits_is_an_error(output: object) -> None:
    class Odd(nn.Module):
        def forward(self, pixels: Tensor) -> object:
            return output

    with pytest.raises(InputError, match=r"expected a classifier that returns logits of shape \(pictures, classes\)"):
        predict(Odd(), [pictures()])


def test_every_field_is_filled_when_labels_and_reference_are_given() -> None:
    reference = torch.eye(3)[[0, 1, 2, 0, 2]] * 2
    result = evaluate_classifier(
        Mean(), pictures().split(2), reference=reference, class_ids=[0, 1, 0, 0, 1], source="five"
    )
    assert (result.count, result.source) == (5, "five")
    assert (result.top1, result.fp_top1, result.agreement) == (0.8, 0.6, 0.8)
    assert result.kl is not None and result.kl > 0
    assert result.to_json() == json.loads(json.dumps(result.to_json(), allow_nan=False))


def test_fields_that_are_not_known_are_none() -> None:
    plain = evaluate_classifier(Mean(), [pictures()]).to_json()
    assert plain == {
        "count": 5,
        "source": None,
        "top1": None,
        "fp_top1": None,
        "agreement": None,
        "kl": None,
        "sqnr_db": None,
        "perplexity": None,
        "fp_perplexity": None,
    }
    assert evaluate_classifier(Mean(), [pictures()], class_ids=[0] * 5).fp_top1 is None


def test_an_infinite_ratio_is_none_in_json() -> None:
    result = evaluate_classifier(Mean(), [pictures()], reference=torch.eye(3)[[0, 1, 2, 0, 1]])
    assert result.sqnr_db == float("inf")
    assert result.to_json()["sqnr_db"] is None
    assert Evaluation(count=1, sqnr_db=3.0).to_json()["sqnr_db"] == 3.0


def test_a_network_that_gives_nan_is_an_error_when_it_is_judged() -> None:
    model = Mean()
    model.scale.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        evaluate_classifier(model, [pictures()], class_ids=[0] * 5)


def test_the_demo_model_is_right_on_most_of_its_pictures(demo_model_folder: Path, demo_test_folder: Path) -> None:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(
        demo_model_folder, local_files_only=True, dtype=torch.float32
    )
    images = open_images(demo_test_folder).sample(100, seed=0)
    ids = class_ids(images.labels or (), model.config.label2id)
    result = evaluate_classifier(model, images.pixel_batches(load_processor(demo_model_folder), 50), class_ids=ids)
    assert result.top1 is not None and result.top1 > 0.8  # measured: 0.87 on 1,000
