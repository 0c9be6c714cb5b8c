"""A transformers model without its weights: everything that is stored stands on the meta device.

Buffers that are not stored, such as rotary frequencies, are computed as the class does it.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from dither.errors import InputError
from dither.models.checkpoint import Checkpoint, Place
from dither.nn.experts import is_fused

_Sources = dict[str, list[tuple[str, ...]]]


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
    """The checkpoint with its tensors under the names that they have in the model's state, its experts taken apart.

    Raises:
        InputError: a tensor of the model is not stored as it is; the message says why it cannot be read by itself.
    """
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    sources: _Sources = {name: [(name,)] for name in checkpoint.places}
    if not all(set(group) & set(sources) for group in tied.values()):
        sources = _sources(model, checkpoint)
    places: dict[str, tuple[Place, ...]] = {}
    for group in tied.values():
        stored = [sources[name] for name in group if name in sources]
        if not stored:
            raise InputError(f"{where} does not store {group[0]} as {type(model).__name__} holds it")
        if any(not torch.equal(*(checkpoint.read(one[0][0]) for one in (stored[0], other))) for other in stored[1:]):
            raise InputError(f"{where} stores different values for {' and '.join(group)}, which the model ties")
        found = [tuple(place for name in part for place in checkpoint.places[name]) for part in stored[0]]
        for name in group:
            places |= _taken_apart(model, name, found)
    return Checkpoint(places)


def _taken_apart(model: nn.Module, name: str, found: list[tuple[Place, ...]]) -> dict[str, tuple[Place, ...]]:
    """The places of a tensor, or of each expert's part of it under the names that `Experts` gives them."""
    holder, _, key = name.rpartition(".")
    module = model.get_submodule(holder)
    if not is_fused(module) or key not in module._parameters:
        return {name: found[0]}
    bias, count = key.endswith("_bias"), len(module.get_parameter(key))
    if len(found) == 1:  # stored as one
        turned = bool(module.is_transposed) and not bias
        found = [tuple(place._replace(part=k, transposed=turned) for place in found[0]) for k in range(count)]
    leaf, kind = (key.removesuffix("_bias"), "bias") if bias else (key, "weight")
    return {f"{holder}.{leaf}.{k}.{kind}": part for k, part in enumerate(found)}


def _sources(model: nn.Module, checkpoint: Checkpoint) -> _Sources:
    """For each name in the model the names in the checkpoint as transformers renames them.

    Of a stack of experts these are the names for each expert, of matrices that follow one another.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules: Any = get_model_conversion_mapping(model, None, None)  # type: ignore[arg-type]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state, plain, stacks = model.state_dict(), _Sources(), dict[str, dict[str, list[str]]]()
        for name in sorted(checkpoint.places, key=dot_natural_key):
            prefix: Any = model.base_model_prefix
            new, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if pattern is None:
                plain[new] = [(name,)]
            else:
                stacks.setdefault(new, {}).setdefault(pattern, []).append(name)
    except (ImportError, TypeError, AttributeError):  # another transformers keeps its rules elsewhere
        return {}
    orders = {pattern: rule.source_patterns for rule in converters if _stacks(rule) for pattern in rule.source_patterns}
    for new, held in stacks.items():
        order = orders.get(next(iter(held)), [])
        lists = [held[pattern] for pattern in order if pattern in held]
        if len(lists) == len(order) > 0 and len({len(one) for one in lists}) == 1:
            plain[new] = list(zip(*lists, strict=True))
    return plain


def _stacks(rule: Any) -> bool:
    """Whether a rule of transformers only stacks experts and puts the rows of their matrices one after the other."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    return steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
