"""Generation: greedy as transformers', draws as the softmax says, one noise for all models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dither.errors import InputError
from dither.evaluation.generation import (
    Generated,
    Sampling,
    agreement,
    choose,
    common_start,
    continuation_nll,
    distinct,
    encode,
    generate,
    stops,
)
from dither.models.network import Network

PROMPT = torch.tensor([1, 5, 7])


def test_the_likeliest_tokens_are_those_that_transformers_finds(tiny: Callable[..., Any]) -> None:
    model = tiny("LlamaForCausalLM").model
    expected = model.generate(PROMPT[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, PROMPT, Sampling(max_new_tokens=8)).tokens == tuple(expected[0, 3:].tolist())


def test_draws_follow_the_softmax_of_the_likeliest() -> None:
    logits, generator = torch.tensor([1.0, 0.0, 2.0, -3.0]), torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=0.5, top_k=3)
    drawn = torch.tensor([choose(logits, sampling, generator) for _ in range(4000)])
    expected = torch.tensor([1.0, 0.0, 2.0]).div(0.5).softmax(0)
    counts = torch.bincount(drawn, minlength=4) / 4000
    assert counts[3] == 0
    assert torch.allclose(counts[:3], expected, atol=0.025)  # three standard deviations of 4,000 draws


def test_a_seed_gives_one_text_and_shorter_texts_are_its_beginning(tiny: Callable[..., Any]) -> None:
    model = tiny("LlamaForCausalLM").model
    long = generate(model, PROMPT, Sampling(12, temperature=1.0, seed=3))
    assert generate(model, PROMPT, Sampling(12, temperature=1.0, seed=3)).tokens == long.tokens
    assert generate(model, PROMPT, Sampling(5, temperature=1.0, seed=3)).tokens == long.tokens[:5]
    assert generate(model, PROMPT, Sampling(12, temperature=1.0, seed=4)).tokens != long.tokens
    assert list(long.times_s) == sorted(long.times_s)


def test_global_randomness_is_not_touched(tiny: Callable[..., Any]) -> None:
    model = tiny("LlamaForCausalLM").model
    before = torch.get_rng_state()
    generate(model, PROMPT, Sampling(3, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_token_ends_the_text(tiny: Callable[..., Any]) -> None:
    model = tiny("LlamaForCausalLM").model
    free = generate(model, PROMPT, Sampling(8)).tokens
    first = free.index(free[2])
    assert generate(model, PROMPT, Sampling(8), stop={free[2]}).tokens == free[: first + 1]


def test_the_likelihood_of_a_continuation_is_that_of_its_steps(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    tokens = generate(network.model, PROMPT, Sampling(6, temperature=1.0)).tokens
    found = continuation_nll(network.model, PROMPT, tokens)
    for place, token in enumerate(tokens):
        text = torch.cat([PROMPT, torch.tensor(tokens[:place])]).long()
        expected = -network.logits({"input_ids": text[None]})[0, -1].log_softmax(0)[token]
        assert float(found[place]) == pytest.approx(float(expected), abs=1e-4)


def test_repetition_and_agreement_are_counted() -> None:
    assert distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([1], 2) == 1.0
    assert agreement([1, 2, 3, 4], [1, 9, 3]) == 0.5
    assert agreement([], []) == 1.0
    assert common_start([1, 2, 3], [1, 2, 4]) == 2
    assert common_start([1, 2], [1, 2, 4]) == 2


def test_speed_leaves_out_the_reading_of_the_prompt() -> None:
    assert Generated((1, 2, 3), (5.0, 6.0, 7.0)).tokens_per_s == 1.0


def test_impossible_samplings_and_prompts_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="temperature from 0 on"):
        Sampling(temperature=-1.0)
    network = Network(tiny("LlamaForCausalLM").model, "llama")
    with pytest.raises(InputError, match="llama has no tokenizer"):
        encode(network, "text", 3)
    network.tokenizer = lambda text: {"input_ids": [ord(letter) - 97 for letter in text]}
    assert encode(network, "abc", 3).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="the prompt is empty"):
        encode(network, "", 3)
    with pytest.raises(InputError, match="3 \\+ 14 tokens are more than the 16"):
        encode(network, "abc", 14)
    assert stops(network) == {2}
