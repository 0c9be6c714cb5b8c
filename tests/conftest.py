"""Fixtures for all rooms: the demo's own model and pictures, and tiny random networks of many architectures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DEMO = Path(__file__).parents[1] / "src" / "dither" / "demo_data"


@pytest.fixture(scope="session")
def demo_model_folder() -> Path:
    """A tiny trained ViT with its image processor."""
    return DEMO / "vit_tiny"


@pytest.fixture(scope="session")
def demo_calibration_folder() -> Path:
    """32 pictures in folders named by class."""
    return DEMO / "cifar10" / "calibration"


@pytest.fixture(scope="session")
def demo_test_folder() -> Path:
    """1,000 pictures in folders named by class."""
    return DEMO / "cifar10" / "test"


# Two or three layers of a few channels; `input` is a picture's side or a text's length.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {"image_size": 16, "patch_size": 4, "input": 16},
    "DeiTForImageClassification": {"image_size": 16, "patch_size": 4, "input": 16},
    "SwinForImageClassification": {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4,
        "input": 32,
    },
    "BertForSequenceClassification": {"vocab_size": 40, "max_position_embeddings": 16, "input": 7},
    "AlbertForSequenceClassification": {
        "vocab_size": 40, "embedding_size": 16, "max_position_embeddings": 16, "input": 7,
    },
    "LlamaForCausalLM": {"vocab_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 16, "input": 7},
    "OPTForCausalLM": {
        "vocab_size": 40, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16, "input": 7,
    },
    "Qwen2ForCausalLM": {"vocab_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 16, "input": 7},
    "Qwen3ForCausalLM": {
        "vocab_size": 40, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 16, "input": 7,
    },
    "GPT2LMHeadModel": {
        "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48, "n_positions": 16,
        "bos_token_id": 1, "eos_token_id": 2, "input": 7,
    },
    "GPTNeoXForCausalLM": {
        "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "input": 7,
    },
    "MixtralForCausalLM": {
        "vocab_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 16, "num_local_experts": 4, "input": 7,
    },
    "Qwen2MoeForCausalLM": {
        "vocab_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "input": 7,
    },
    "GptOssForCausalLM": {
        "vocab_size": 40, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 16,
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention", "full_attention"],
        "input": 7,
    },
    "SegformerForImageClassification": {
        "depths": [1, 1], "hidden_sizes": [16, 16], "num_attention_heads": [1, 2], "sr_ratios": [2, 1],
        "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "input": 32,
    },
    "ConvNextForImageClassification": {"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2, "input": 32},
    "ResNetForImageClassification": {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "input": 32,
    },
    "MobileNetV2ForImageClassification": {"image_size": 32, "depth_multiplier": 0.25, "input": 32},
}  # fmt: skip
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@dataclass
class Tiny:
    """A tiny network in evaluation mode and inputs that it can be called on."""

    model: nn.Module
    batch: Callable[..., Any]  # (count, seed=0, size=…) → a batch

    def logits(self, batch: Any, model: nn.Module | None = None) -> Tensor:
        """What the network, or another one of its class, says."""
        model = self.model if model is None else model
        with torch.no_grad():
            output = model(**batch) if isinstance(batch, dict) else model(batch)
        return output if isinstance(output, Tensor) else output.logits


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Other parameters: norms near 1, matrices that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(draw * 0.2 + float(name.endswith("weight")))
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    """Makes a tiny random network of a transformers class: `tiny("ViTForImageClassification", attention="eager")`."""

    def make(
        name: str = "ViTForImageClassification", attention: str | None = None, seed: int = 0, **settings: Any
    ) -> Tiny:
        import transformers

        kind = getattr(transformers, name)
        fields = {**COMMON, "num_labels": 5, **ARCHITECTURES[name], **settings}
        size = fields.pop("input")
        known = set(kind.config_class().to_dict()) | {"num_labels"}
        fields = {key: value for key, value in fields.items() if key in known}
        config = kind.config_class(**fields)
        if attention is not None:
            config._attn_implementation = attention

        def batch(count: int, seed: int = 0, size: int = size) -> Any:
            generator = torch.Generator().manual_seed(seed)
            if "vocab_size" in fields:
                return {"input_ids": torch.randint(0, fields["vocab_size"], (count, size), generator=generator)}
            return torch.randn(count, 3, size, size, generator=generator)

        return Tiny(randomize(kind(config), seed), batch)

    return make


class Mlp(nn.Module):
    """A plain module without configuration: an attention of its own, odd sizes, layers with and without bias."""

    def __init__(self, width: int = 12, heads: int = 2, hidden: int = 17, depth: int = 2, inputs: int = 7) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(OddBlock(width, heads, hidden) for _ in range(depth))
        self.head = nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class OddBlock(nn.Module):
    """A transformer block whose own forward computes the attention."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


@pytest.fixture
def odd() -> Callable[..., Tiny]:
    """Makes a plain module of odd sizes: width 12, hidden 17."""

    def make(seed: int = 0, **sizes: int) -> Tiny:
        inputs = sizes.get("inputs", 7)

        def batch(count: int, seed: int = 0, size: int = 6) -> Tensor:
            return torch.randn(count, size, inputs, generator=torch.Generator().manual_seed(seed))

        return Tiny(randomize(Mlp(**sizes), seed), batch)

    return make
