"""Experts that were taken apart, put back into the three-dimensional tensors that transformers expects."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from dither.export.source import Source

_BIAS = "_bias"


@dataclass(frozen=True)
class Stack:
    """A fused tensor [experts, …] and the tensors of its experts, in order; `transposed` where it holds [i, o]."""

    members: tuple[str, ...]
    transposed: bool

    def read(self, source: Source, cast: Callable[[str, Tensor], Tensor]) -> Shaped[Tensor, "..."]:
        """The fused tensor, of what codes stand for or of what was kept."""
        parts = [cast(name, _member(source, name)) for name in self.members]
        return torch.stack([part.T if self.transposed else part for part in parts])

    def part(self, fused: Shaped[Tensor, "..."], expert: int) -> Shaped[Tensor, "..."]:
        """The tensor of one expert, [o, i] or [o]."""
        return fused[expert].T if self.transposed else fused[expert]


def stacks(source: Source, model: nn.Module) -> dict[str, Stack]:
    """All fused tensors of the experts that were taken apart, by their names in the plain architecture `model`."""
    found = {}
    for place in source.structure.get("experts", ()):
        fused = model.get_submodule(place)
        for leaf, like in fused.named_parameters(recurse=False):
            owner, kind = (leaf.removesuffix(_BIAS), "bias") if leaf.endswith(_BIAS) else (leaf, "weight")
            members = tuple(f"{place}.{owner}.{expert}.{kind}" for expert in range(like.shape[0]))
            found[f"{place}.{leaf}"] = Stack(members, kind == "weight" and bool(fused.is_transposed))
    return found


def without(source: Source, found: dict[str, Stack]) -> Source:
    """The network as if the experts that were taken apart were not in it."""
    members = {name for stack in found.values() for name in stack.members}
    owners = tuple(name.rpartition(".")[0] + "." for name in members)
    layers = {name: entry for name, entry in source.layers.items() if f"{name}.weight" not in members}
    structure = {key: part for key, part in source.structure.items() if key != "experts"} | {"layers": layers}
    return replace(source, structure=structure, names=tuple(n for n in source.names if not n.startswith(owners)))


def _member(source: Source, name: str) -> Tensor:
    owner, _, kind = name.rpartition(".")
    return source.weight(owner).dequantize() if kind == "weight" and owner in source.layers else source.read(name)
