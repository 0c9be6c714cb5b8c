"""Perplexity of a language model, and how faithful it is to the full-precision one.

A vocabulary's logits at every position are too many to keep. Kept are the probability of what follows, the preferred
token, and the `TOP` likeliest tokens; the divergence is computed over those and all others taken together, which
bounds the full divergence from below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dither.errors import InputError, NonFiniteError
from dither.evaluation.classification import Evaluation, evaluating

TOP = 32
Progress = Callable[[int], None]  # called with the number of windows done so far


@dataclass(frozen=True)
class Answers:
    """What a model says to n windows of t tokens, on the CPU: negative log-likelihoods in nats, preferences, top log p.

    `tokens` are the reference's likeliest tokens (its own, if it is the reference) and `log_p` this model's log
    probabilities of them.
    """

    nll: Float[Tensor, "n s"]
    preferred: Int[Tensor, "n s"]
    tokens: Int[Tensor, "n s k"]
    log_p: Float[Tensor, "n s k"]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood over all predicted tokens; inf where that overflows."""
        mean = self.nll.double().mean().item()
        return math.exp(mean) if mean < 700 else math.inf


def answer(
    model: nn.Module,
    windows: Int[Tensor, "n t"],
    at: Int[Tensor, "n s k"] | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Run a causal language model over windows, one at a time; `at` are the tokens a reference found likeliest.

    Raises:
        InputError: the model does not return logits of a vocabulary that holds the tokens.
        NonFiniteError: its logits are NaN.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    rows: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), evaluating(model):
        for index, window in enumerate(windows):
            log_p = _log_probabilities(model, window.to(device))
            following = window[1:, None].to(device)
            nll = -log_p.gather(1, following)[:, 0]
            if bool(nll.isnan().any()):
                raise NonFiniteError(f"the model's logits of window {index} hold NaN")
            best = log_p.topk(min(TOP, log_p.shape[1]), dim=1).indices if at is None else at[index].long().to(device)
            parts = (nll, log_p.argmax(dim=1).int(), best.int(), log_p.gather(1, best))
            rows.append(tuple(part.cpu() for part in parts))
            if progress is not None:
                progress(index + 1)
    return Answers(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _log_probabilities(model: nn.Module, window: Int[Tensor, " t"]) -> Float[Tensor, "s v"]:
    output = model(input_ids=window[None], use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[2] <= int(window.max()):
        raise InputError(f"{type(model).__name__} is no causal language model: expected logits of every token")
    return logits[0, :-1].float().log_softmax(dim=1)


def evaluate_language(answers: Answers, reference: Answers | None, count: int, source: str | None) -> Evaluation:
    """Perplexity, and fidelity where the full-precision model's answers are given."""
    if reference is None:
        return Evaluation(count, source, perplexity=answers.perplexity)
    return Evaluation(
        count,
        source,
        perplexity=answers.perplexity,
        fp_perplexity=reference.perplexity,
        agreement=(answers.preferred == reference.preferred).double().mean().item(),
        kl=_divergence(reference.log_p.double(), answers.log_p.double()),
    )


def _divergence(log_p: Float[Tensor, "n s k"], log_q: Float[Tensor, "n s k"]) -> float:
    """Mean KL(p ‖ q) in nats over the kept tokens and the rest of the vocabulary as one more."""
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = ((1 - x.sum(dim=2)).clamp_min(1e-12) for x in (p, q))
    known = (p * (log_p - log_q)).sum(dim=2)
    return max(float((known + rest_p * (rest_p.log() - rest_q.log())).mean()), 0.0)
