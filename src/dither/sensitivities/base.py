"""What every sensitivity is given and gives back, and how finished parts of a measurement outlive a kill."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dither.allocation.table import Option, Unit
from dither.engine.local import Engine, InProcess
from dither.engine.purpose import precisely
from dither.formats.fit import fit_grid
from dither.formats.qtensor import QTensor, quantize
from dither.formats.spec import QuantSpec
from dither.models.anatomy import Anatomy
from dither.models.gradients import Gradients
from dither.models.layers import Layer, is_layer, weight_matrix
from dither.models.network import Network
from dither.sensitivities.solved import Solved, solve_block
from dither.solvers.levels import fit_levels
from dither.storage import write_json, writing
from dither.walk import Block, walk

Progress = Callable[[str, int, int], None]  # (what, done, in all)
T = TypeVar("T")
R = TypeVar("R")
_NAME = 200  # characters of a file's name


@dataclass(frozen=True)
class Measured:
    """Scores [u, p] of units and options, infinite ones aside; what else a sensitivity knows of them."""

    scores: Float[np.ndarray, "u p"]
    errors: Float[np.ndarray, "u p"] | None = None
    priority: Float[np.ndarray, " u"] | None = None
    pairs: Mapping[int, Float[np.ndarray, "u u"]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Kept:
    """Finished parts of a measurement as JSON files in a folder; without one they are only computed."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(self, name: str, compute: Callable[[], T]) -> T:
        """What was kept under a name, else what is computed now; plain data."""
        if self.folder is None:
            return compute()
        path = self._path(self.folder, name)
        if path.is_file():
            found: T = json.loads(path.read_text())
            return found
        made = compute()
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(made, path)
        return made

    def __contains__(self, name: str) -> bool:
        return self.folder is not None and self._path(self.folder, name).is_file()

    def _path(self, folder: Path, name: str) -> Path:
        plain = quote(name, safe="")
        short = plain if len(plain) <= _NAME else hashlib.sha256(name.encode()).hexdigest()  # files' names have limits
        return folder / f"{short}.json"


@dataclass
class Probe:
    """A full-precision network, its units and options, data to measure on, and where finished parts are kept.

    `able[u, p]` says which options a unit can have. Whoever measures leaves the network as it was. `engine` runs the
    probes; a copy of the network goes to each of its workers, as a pickled probe keeps nothing and tells nobody.
    Weights become the codes that are `solved`, else the nearest ones. What solves them reads the batches `solved_on`
    where these are given: judged on those, weights seem better than they are.
    """

    network: Network
    anatomy: Anatomy
    batches: Sequence[Any]
    units: tuple[Unit, ...]
    options: tuple[Option, ...]
    able: Any
    seed: int = 0
    kept: Kept = field(default_factory=lambda: Kept(None))
    progress: Progress | None = None
    engine: Engine = field(default_factory=InProcess)
    solved: Solved | None = None
    solved_on: Sequence[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": Kept(None), "progress": None, "engine": InProcess(), "solved_on": None}

    def each(self, what: str, function: Callable[[T], R], tasks: Mapping[str, T]) -> Iterator[R]:
        """function(task) of each named task, in order: what was kept is read, the rest is run by the engine.

        A result is kept when its turn has come. Functions of other engines than this process are picklable and hold
        the probe; what they give is plain data. Whoever needs no more results stops asking for them.
        """
        missing = [task for name, task in tasks.items() if name not in self.kept]
        results = iter(self.engine.map(partial(precisely, function), missing)) if missing else iter(())
        for number, name in enumerate(tasks):
            found = self.kept(name, partial(next, results))
            self.say(what, number + 1, len(tasks))
            yield found

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers of all units."""
        return tuple(name for unit in self.units for name in unit.layers)

    def layer(self, name: str) -> Layer:
        """A layer in full precision."""
        module = self.network.model.get_submodule(name)
        if not is_layer(module):
            raise TypeError(f"{name} is a {type(module).__name__}, not a layer")
        return module

    def weight(self, name: str) -> Float[Tensor, "o i"]:
        """A layer's weight as a float32 matrix."""
        return weight_matrix(self.layer(name), name)

    def solve(self) -> None:
        """Let the method solve every layer as every option, before `codes` are asked for; what is solved is kept."""
        if self.solved is None or all(name in self.solved for name in self.layers):
            return
        able = {name: self.can(number) for number, unit in enumerate(self.units) for name in unit.layers}
        for number, block in enumerate(self.blocks()):
            solve_block(self.solved, block, self.options, able, self.engine)
            self.say(f"weights by {self.solved.method.name}", number + 1, len(self.anatomy.units))

    def blocks(self) -> Iterator[Block]:
        """A walk over the full-precision network, on what weights are solved on."""
        network = self.network
        with network.by_hand([unit.name for unit in self.anatomy.units]):
            batches = self.batches if self.solved_on is None else self.solved_on
            yield from walk(network.model, self.anatomy, network.run, batches, "fp", load=network.load)

    def codes(self, name: str, place: int) -> QTensor:
        """A layer's weight as an option that changes weights."""
        spec = self.options[place].weights
        if spec is None:
            raise TypeError(f"option {place} leaves weights as they are")
        if self.solved is None:
            return rounded(self.weight(name), spec)
        return self.solved.read(name, place, self.network.device)

    @torch.no_grad()
    def stored(self, name: str, place: int) -> Float[Tensor, "o i"]:
        """What a layer's weight becomes under an option."""
        return self.weight(name) if self.options[place].weights is None else self.codes(name, place).dequantize()

    def gradients(self) -> Gradients:
        """Backward passes over the data."""
        resident = self.network.weights is None
        return Gradients(self.network.model, self.network.run, self.batches, None, resident)

    def table(self, rows: Mapping[str, Sequence[float]]) -> Float[np.ndarray, "u p"]:
        """Rows of units by name as an array, infinite where a unit cannot have an option."""
        return np.where(self.able, np.array([rows[unit.name] for unit in self.units], dtype=np.float64), np.inf)

    def by_unit(self, layers: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Rows of layers summed over each unit's layers."""
        return {
            unit.name: [sum(layers[name][p] for name in unit.layers) for p in range(len(self.options))]
            for unit in self.units
        }

    def can(self, unit: int) -> list[int]:
        """The options that a unit can have."""
        return [p for p in range(len(self.options)) if self.able[unit, p]]

    def say(self, what: str, done: int, total: int) -> None:
        """Tell whoever watches."""
        if self.progress is not None:
            self.progress(what, done, total)


@runtime_checkable
class Sensitivity(Protocol):
    """A way to measure what formats cost; its fields are its settings."""

    name: ClassVar[str]
    about: ClassVar[str]

    def measure(self, probe: Probe) -> Measured:
        """Scores of all units and options."""
        ...


def rounded(weight: Float[Tensor, "o i"], spec: QuantSpec) -> QTensor:
    """A weight's nearest codes in a format, with the ranges that the format's own search finds."""
    grid = fit_levels(weight, spec, None) if spec.kind == "nuq" else fit_grid(weight, spec)
    return quantize(weight, grid)
