"""The settings inside a GGUF file: sizes, rotary frequencies and the vocabulary."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from dither.errors import InputError
from dither.export.gguf_tokenizer import Vocabulary
from dither.export.source import Source

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type → GGUF's name
ROPE = "rope_freqs.weight"
QUANTIZATION_VERSION = 2  # of ggml's block formats


def write_settings(writer: Any, source: Source, file_type: int) -> None:
    """Sizes and constants of the architecture.

    Raises:
        InputError: its rotary embedding is of a kind that has no place in the format.
    """
    config = source.config
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = _rope(config)
    writer.add_name(source.name)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_file_type(file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise InputError(f"gguf: rotary embeddings of type {rope['rope_type']} are not exported; use --to dequantized")
    return rope


def rope_factors(config: Mapping[str, Any]) -> Float[np.ndarray, " f"] | None:
    """What llama3 scaling divides each rotary frequency by, which the format holds as a tensor; None without it."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = AutoConfig.for_model(**config)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))[0].double()
    places = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return np.asarray(float(rope["rope_theta"]) ** -places / scaled).astype(np.float32)


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Tokens and how they are made."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for short, number in vocabulary.special.items():
        getattr(writer, f"add_{short}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
