"""A transformers model without its weights: everything that is stored stands on the meta device.

Buffers that are not stored, such as rotary frequencies, are computed as the class does it.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from dither.errors import InputError
from dither.models.checkpoint import Checkpoint


def skeleton(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """An instance of a transformers class (or of one of its automatic classes) without weights, in evaluation mode."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = kind._model_mapping[type(config)] if hasattr(kind, "_model_mapping") else kind
    with init_empty_weights(include_buffers=False):
        model: nn.Module = kind._from_config(config, dtype=dtype)
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                module._buffers[key] = buffer.to("meta")
    return model.eval()


def fitted(checkpoint: Checkpoint, model: nn.Module, where: str) -> Checkpoint:
    """The checkpoint with its tensors under the names that they have in the model's state.

    Raises:
        InputError: a tensor of the model is not stored as it is; the message says why it cannot be read by itself.
    """
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    names = {name: name for name in checkpoint.places}
    if not all(set(group) & set(names) for group in tied.values()):
        names = _renamed(model, checkpoint)
    found: dict[str, str] = {}
    for group in tied.values():
        stored = [names[name] for name in group if name in names]
        if not stored:
            raise InputError(f"{where} does not store {group[0]} as {type(model).__name__} holds it")
        if any(not torch.equal(checkpoint.read(stored[0]), checkpoint.read(other)) for other in set(stored[1:])):
            raise InputError(f"{where} stores different values for {' and '.join(group)}, which the model ties")
        found |= dict.fromkeys(group, stored[0])
    return checkpoint.renamed(found)


def _renamed(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the model → name in the checkpoint as transformers renames them, without what it computes anew."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules: Any = get_model_conversion_mapping(model, None, None)  # type: ignore[arg-type]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state, found = model.state_dict(), {}
        for name in sorted(checkpoint.places):
            prefix: Any = model.base_model_prefix
            new, converted = rename_source_key(name, renamings, converters, prefix, state)
            if converted is None:
                found[new] = name
    except (ImportError, TypeError, AttributeError):  # another transformers keeps its rules elsewhere
        return {}
    return found
