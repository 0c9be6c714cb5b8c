"""A tiny language model that has learned something, so that its losses mean something."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

_TOKENS, _LENGTH = 16, 12


@dataclass
class Trained:
    """A Llama of one layer and sequences of the language that it was trained on."""

    model: nn.Module
    calibration: list[dict[str, Tensor]]
    test: Tensor

    def loss(self, model: nn.Module) -> float:
        """Mean next-token cross-entropy on the test sequences, in nats."""
        with torch.no_grad():
            return float(_loss(model, self.test))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _sequences(count: int, generator: torch.Generator) -> Tensor:
    """Walks over a ring of tokens: a step of 1, 3 or 7, the same all the way except for one step in ten."""
    steps = torch.tensor([1, 3, 7])[torch.randint(3, (count, 1), generator=generator)].repeat(1, _LENGTH)
    slips = torch.rand(count, _LENGTH, generator=generator) < 0.1
    steps[slips] = torch.randint(_TOKENS, (int(slips.sum()),), generator=generator)
    return (torch.randint(_TOKENS, (count, 1), generator=generator) + steps.cumsum(1)) % _TOKENS


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Trained on the processor, in about a second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=_TOKENS, max_position_embeddings=_LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(120):
            optimizer.zero_grad()
            _loss(model, _sequences(32, generator)).backward()
            optimizer.step()
    calibration = [{"input_ids": part} for part in _sequences(32, generator).split(8)]
    return Trained(model.eval().requires_grad_(False), calibration, _sequences(128, generator))
