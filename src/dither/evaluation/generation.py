"""Text from a causal language model, token by token, with noise that other models can be given too.

A token is drawn by adding Gumbel noise to the logits over the temperature and taking the largest, which draws from the
softmax exactly. The noise comes from the seed alone, so two models that agree in their logits draw the same tokens, and
texts differ where the models do [choice].
"""

from collections.abc import Collection
from dataclasses import dataclass
from inspect import signature
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dither.errors import InputError
from dither.evaluation.classification import evaluating
from dither.models.network import Network


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn among the `top_k` likeliest (None: all)."""

    max_new_tokens: int = 50
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise InputError(
                f"expected at least one new token, a temperature from 0 on and top-k from 1 on, got {self}"
            )


@dataclass(frozen=True)
class Generated:
    """New tokens, and the seconds from the start until each was known."""

    tokens: tuple[int, ...]
    times_s: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first, whose time is that of reading the prompt."""
        spent = self.times_s[-1] - self.times_s[0]
        return (len(self.tokens) - 1) / spent if len(self.tokens) > 1 and spent > 0 else float("nan")


def generate(model: nn.Module, prompt: Int[Tensor, " t"], sampling: Sampling, stop: Collection[int] = ()) -> Generated:
    """Go on from a prompt until a token of `stop`, which is kept, or as far as the sampling says."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(sampling.seed)
    step, tokens, times = prompt[None].to(device), list[int](), list[float]()
    # transformers renames the argument; older and newer releases know one of the two
    remembered = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    known: dict[str, Any] = {}
    start = perf_counter()
    with torch.no_grad(), evaluating(model):
        while len(tokens) < sampling.max_new_tokens and not (tokens and tokens[-1] in stop):
            output: Any = model(input_ids=step, use_cache=True, **known)
            tokens.append(choose(output.logits[0, -1].float().cpu(), sampling, generator))
            times.append(perf_counter() - start)
            step, known = torch.tensor([[tokens[-1]]], device=device), {remembered: output[remembered]}
    return Generated(tuple(tokens), tuple(times))


def choose(logits: Float[Tensor, " v"], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64).clamp_min(1e-300)
    noisy = logits.double() / sampling.temperature - (-uniform.log()).log()
    if sampling.top_k is not None and sampling.top_k < len(logits):
        noisy[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    return int(noisy.argmax())


def continuation_nll(model: nn.Module, prompt: Int[Tensor, " t"], tokens: Collection[int]) -> Float[Tensor, " n"]:
    """Negative log-likelihood in nats of each token that follows the prompt, all in one pass."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    following = torch.tensor(list(tokens))
    text = torch.cat([prompt, following])[None].to(device)
    with torch.no_grad(), evaluating(model):
        log_p: Tensor = model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(1)
    return -log_p.cpu().gather(1, following[:, None])[:, 0]


def encode(network: Network, prompt: str, new_tokens: int) -> Int[Tensor, " t"]:
    """A prompt as tokens.

    Raises:
        InputError: the network has no tokenizer, the prompt is empty, or it and what follows are too long.
    """
    if network.tokenizer is None:
        raise InputError(f"{network.name} has no tokenizer; copy the original's files into its folder")
    tokens: Tensor = torch.tensor(network.tokenizer(prompt)["input_ids"], dtype=torch.long)
    if len(tokens) == 0:
        raise InputError("the prompt is empty; give it at least one word")
    if len(tokens) + new_tokens > network.context:
        raise InputError(f"{len(tokens)} + {new_tokens} tokens are more than the {network.context} that it reads")
    return tokens


def stops(network: Network) -> set[int]:
    """The tokens that end a text."""
    settings = getattr(network.model, "generation_config", None)
    ends = [getattr(settings, "eos_token_id", None), network.config.get("eos_token_id")]
    ends.append(getattr(network.tokenizer, "eos_token_id", None))
    flat = [one for end in ends for one in (end if isinstance(end, list) else [end])]
    return {int(one) for one in flat if isinstance(one, int)}


def distinct(tokens: Collection[int], length: int) -> float:
    """Different runs of so many tokens over all of them; 1 where there is none."""
    text = list(tokens)
    runs = [tuple(text[k : k + length]) for k in range(len(text) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def agreement(one: Collection[int], other: Collection[int]) -> float:
    """Share of positions with the same token, of the longer text's; 1 for two empty texts."""
    longest = max(len(one), len(other))
    return sum(a == b for a, b in zip(one, other, strict=False)) / longest if longest else 1.0


def common_start(one: Collection[int], other: Collection[int]) -> int:
    """Tokens until two texts first differ."""
    pairs = list(zip(one, other, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
