"""What layers' weights become as each option where a method solves them, as its own run would: from Grams.

One walk over the full-precision network: layers that share an input have one Gram for each input format, every option
is solved from it, and the codes go to disk layer by layer, so that no more than a block's are in memory.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open

from dither.allocation.table import Option
from dither.calibrate import LayerTask, measure
from dither.engine.local import Engine
from dither.engine.purpose import precisely
from dither.errors import InputError
from dither.formats.qtensor import QTensor
from dither.methods.base import Method
from dither.models.structure import describe_weight, read_layout
from dither.storage import write_tensors, writing
from dither.walk import Block

R = TypeVar("R")
Places = Mapping[str, Sequence[int]]  # layer → the options that it can have


@dataclass(frozen=True)
class Solved:
    """A method, and a folder with the codes that it gives; a file for each layer that is solved."""

    method: Method
    folder: Path

    def __contains__(self, layer: str) -> bool:
        return self._path(layer).is_file()

    def write(self, layer: str, codes: Mapping[int, QTensor]) -> None:
        """Keep a layer's codes by option."""
        tensors = {f"{place}.{key}": part for place, one in codes.items() for key, part in one.pack().items()}
        layouts = {str(place): json.dumps(describe_weight(one.layout)) for place, one in codes.items()}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, self._path(layer), layouts)

    def read(self, layer: str, place: int, device: torch.device) -> QTensor:
        """A layer's codes as an option.

        Raises:
            InputError: they are not here: a worker on another machine, which does not see the folder.
        """
        if layer not in self:
            raise InputError(
                f"{str(self.folder)!r} holds no codes of {layer}; workers on other machines need a --scores folder "
                "that they see under the same name"
            )
        with safe_open(self._path(layer), "pt") as file:
            layout = read_layout(json.loads(file.metadata()[str(place)]))
            parts = {key: file.get_tensor(f"{place}.{key}").to(device) for key in layout.tensors()}
        return QTensor.unpack(parts, layout)

    def _path(self, layer: str) -> Path:
        return self.folder / f"{hashlib.sha256(layer.encode()).hexdigest()}.safetensors"


def solve_block(solved: Solved, block: Block, options: Sequence[Option], able: Places, engine: Engine) -> None:
    """Solve those layers of a block that are not solved yet, as all their options that change weights."""
    places = {
        name: [p for p in able[name] if options[p].weights is not None]
        for name in block.unit.layers
        if name in able and name not in solved
    }
    found = of_tasks(block, options, places, partial(_codes, solved.method, options), engine)
    for name, codes in found.items():
        solved.write(name, codes)


def of_tasks(
    block: Block,
    options: Sequence[Option],
    able: Places,
    function: Callable[[tuple[LayerTask, list[int]]], list[R]],
    engine: Engine,
) -> dict[str, dict[int, R]]:
    """What a function makes of each layer's task and places, by place; tasks have full-precision inputs.

    Where an option quantizes inputs, the Gram is of the quantized ones.
    """
    found: dict[str, dict[int, R]] = {name: {} for name in able}
    for spec in dict.fromkeys(options[place].activations for places in able.values() for place in places):
        wanted = {name: [p for p in places if options[p].activations == spec] for name, places in able.items()}
        tasks, _ = measure(block, dict.fromkeys([name for name, places in wanted.items() if places], spec), "fp", {})
        work = [(task, wanted[task.name]) for task in tasks]
        for (task, places), made in zip(work, engine.map(partial(precisely, function), work), strict=True):
            found[task.name] |= dict(zip(places, made, strict=True))
    return found


def solve_as(method: Method, task: LayerTask, option: Option) -> QTensor:
    """A layer's codes as an option, from its task alone."""
    solve = None if option.weights is None else method.alone(option.weights)
    if solve is None:
        raise TypeError(f"{method.name} solves no layer by itself as {option}")
    return solve(task).weight


def _codes(method: Method, options: Sequence[Option], work: tuple[LayerTask, list[int]]) -> list[QTensor]:
    task, places = work
    return [solve_as(method, task, options[place]) for place in places]
