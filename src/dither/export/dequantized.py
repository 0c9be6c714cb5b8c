"""dequantized: the values that the codes stand for as plain 16-bit weights, which any program opens. Nothing is small.

Whatever dither stores can be exported so: codebooks, outliers, low-rank terms and grids that no other format has.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.export.experts import stacks, without
from dither.export.folder import (
    cast,
    check_tensors,
    checkpoint_names,
    chosen_dtype,
    read_back,
    write_config,
    write_folder,
)
from dither.export.source import Source, skeleton, unfolded
from dither.export.written import Written, value_bound
from dither.models.layers import is_conv1d


def write(source: Source, folder: Path, dtype: str) -> Written:
    """Write the folder.

    Raises:
        InputError: the architecture has no place for a tensor, or a value does not fit.
    """
    model, kind = skeleton(source), chosen_dtype(source, dtype)
    if source.structure.get("folded"):
        source = unfolded(source, model)
    fused = stacks(source, model)
    plain = without(source, fused)
    check_tensors(plain, model)
    own = [*plain.kept_names, *(f"{name}.weight" for name in plain.layers), *fused]
    names = checkpoint_names(model, own)
    notes = ["the weights take 16 bits again; activations are no longer quantized"]
    if len(names) < len(own):
        notes.append("experts are stored as this transformers names them; older ones may not find them")
    names = {name: names.get(name, name) for name in own}
    together = ((names[name], stack.read(source, partial(cast, dtype=kind))) for name, stack in fused.items())
    files = write_folder(folder, chain(_tensors(plain, model, names, kind), together), source)
    files.append(write_config(source, folder, kind, None))
    tensors = read_back(folder, files)
    places = {member: (name, k) for name, stack in fused.items() for k, member in enumerate(stack.members)}

    def read(name: str) -> Tensor:
        if name not in places:
            return tensors.read(names[name])
        stack, expert = places[name]
        return fused[stack].part(tensors.read(names[stack]), expert)

    def weight(name: str) -> Float[np.ndarray, "o i"]:
        stored = read(f"{name}.weight").flatten(1).float()
        return np.asarray(stored.T if name in plain.layers and is_conv1d(model.get_submodule(name)) else stored)

    def bound(name: str) -> Float[np.ndarray, "o i"]:
        return value_bound(np.asarray(source.weight(name).dequantize()), kind)

    return Written(
        files, kind, weight, lambda name: read(name) if name in names or name in places else None, bound,
        "transformers and what reads its folders", notes,
    )  # fmt: skip


def _tensors(
    source: Source, model: nn.Module, names: Mapping[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source.kept():
        yield names[name], cast(name, tensor, dtype)
    for name in source.layers:
        layer, matrix = model.get_submodule(name), cast(name, source.weight(name).dequantize(), dtype)
        yield (
            names[f"{name}.weight"],
            matrix.T.contiguous() if is_conv1d(layer) else matrix.reshape(layer.get_parameter("weight").shape),
        )
