"""A tiny random Llama with a tokenizer made in memory, quantized in a chosen format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dither


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of a few letters and four merges."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "."])
    }
    for pair in ("th", "the", "in", "an"):
        vocabulary[pair] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<unk>"), AddedToken("<s>"), AddedToken("</s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def save_language_model(folder: Path) -> Path:
    """A Llama of one block, 64 wide, that never ends a text by itself, with its tokenizer."""
    from tests.conftest import randomize
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=35, max_position_embeddings=64, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    randomize(LlamaForCausalLM(config)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny Llama: 64 wide, two blocks, 4 query and 2 key heads."""

    def make(**settings: Any) -> Path:
        from tests.conftest import randomize
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 1,
            "eos_token_id": 2, "rope_theta": 500.0,
        }  # fmt: skip
        folder = tmp_path / "llama"
        randomize(LlamaForCausalLM(LlamaConfig(**{**fields, **settings}))).save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return make


def tokens(count: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Random input ids."""
    return torch.randint(3, 38, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantized(llama: Callable[..., Path]) -> Callable[..., dither.Result]:
    """Quantizes a tiny Llama but its head: `quantized("int4:g32", overrides={…})`; the first `settings` are Llama's."""

    def make(weights: str = "int4:g32", settings: dict[str, Any] | None = None, **fields: Any) -> dither.Result:
        choices = {"activations": "none", "attention": "none", "probabilities": "none", **fields}
        choices.setdefault("entry_activations", choices["activations"])
        method = dither.RTN(weights=weights, **choices)
        return dither.quantize(llama(**(settings or {})), method, [{"input_ids": tokens()}])

    return make


def logits(model: Any, batch: Tensor | None = None) -> Tensor:
    """What a model says about some tokens."""
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens() if batch is None else batch, use_cache=False).logits
        return output
