import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dither.errors import InputError, NonFiniteError
from dither.evaluation.fidelity import kl_divergence
from dither.evaluation.language import answer, evaluate_language


class Table(nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, vocabulary: int, noise: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(vocabulary, vocabulary, generator=generator)
        noisy = logits + noise * torch.randn(vocabulary, vocabulary, generator=generator)
        self.logits = nn.Parameter(noisy, requires_grad=False)

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


class Classifier(nn.Module):
    """One answer for a whole text."""

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(1, 3))


def windows(vocabulary: int, count: int = 3, length: int = 8) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def test_perplexity_is_the_exponential_of_the_mean_cross_entropy() -> None:
    model, text = Table(50), windows(50)
    logits = model(text[:, :-1]).logits
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    assert answer(model, text).perplexity == pytest.approx(math.exp(entropy.item()), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = Table(50)
    model.logits.zero_()
    assert answer(model, windows(50)).perplexity == pytest.approx(50)


def test_the_divergence_over_the_likeliest_tokens_bounds_the_full_one_closely_from_below() -> None:
    text = windows(200)
    reference = answer(Table(200), text)
    found = evaluate_language(answer(Table(200, 0.3), text, reference.tokens), reference, len(text), "text")
    full = kl_divergence(*(Table(200, n)(text[:, :-1]).logits.flatten(0, 1) for n in (0.0, 0.3)))
    assert found.kl is not None
    assert 0.4 * full < found.kl <= full + 1e-6  # 32 of 200 nearly equal tokens; a real vocabulary is far more unequal
    assert found.agreement is not None
    assert 0.3 < found.agreement < 1
    assert found.fp_perplexity == reference.perplexity


def test_a_small_vocabulary_is_compared_whole() -> None:
    text = windows(20)
    reference = answer(Table(20), text)
    found = evaluate_language(answer(Table(20, 0.3), text, reference.tokens), reference, len(text), None)
    full = kl_divergence(*(Table(20, n)(text[:, :-1]).logits.flatten(0, 1) for n in (0.0, 0.3)))
    assert found.kl == pytest.approx(full, rel=1e-3)


def test_equal_models_agree_everywhere() -> None:
    text = windows(50)
    reference = answer(Table(50), text)
    found = evaluate_language(answer(Table(50), text, reference.tokens), reference, len(text), None)
    assert (found.agreement, found.kl) == (1.0, pytest.approx(0, abs=1e-6))
    assert found.perplexity == found.fp_perplexity


def test_without_a_reference_there_is_perplexity_alone() -> None:
    found = evaluate_language(answer(Table(50), windows(50)), None, 3, "text").to_json()
    assert {key for key, value in found.items() if value is not None} == {"count", "source", "perplexity"}


def test_nan_and_models_without_a_vocabulary_are_refused() -> None:
    broken = Table(50)
    broken.logits[:, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="window 0 hold NaN"):
        answer(broken, windows(50))
    with pytest.raises(InputError, match="no causal language model"):
        answer(Classifier(), windows(50))
