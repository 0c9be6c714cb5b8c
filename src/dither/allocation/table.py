"""ScoreTable: what every format would cost each part of a network, in loss and in resources.

The contract between whoever measures (a sensitivity) and whoever chooses (a solver): one table, many budgets.
Scores are costs: lower is better, and full precision costs 0. Whoever measures quality turns it round at this border.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from dither.errors import InputError, ShapeError
from dither.formats.spec import QuantSpec

SCHEMA = 1
SIZE = "size"  # bits of the stored weights, with scales, zero-points and tables of levels
CODES = "codes"  # bits of the codes alone, which published averages often count
BOPS = "bops"  # multiplications of one sample times the bits of both factors
LATENCY = "latency"  # of a table that the user measured, in its unit
ACTIVATIONS = "activations"  # bits of the inputs of all layers, for one sample


@dataclass(frozen=True)
class Option:
    """What a layer could be stored as: a weight format and, where that is chosen too, one of its inputs.

    Full precision where None; `activations` None leaves the inputs to the recipe.
    """

    weights: QuantSpec | None
    activations: QuantSpec | None = None

    @classmethod
    def parse(cls, text: str, base: QuantSpec | None = None, inputs: QuantSpec | None = None) -> "Option":
        """`int4:g64`, `int4:g64/int8:token` or `none`; what a text leaves out comes from `base` and `inputs`."""
        weights, _, activations = text.strip().partition("/")
        first = None if weights.strip() in ("none", "fp") else QuantSpec.parse(weights, base)
        return cls(first, QuantSpec.parse(activations, inputs) if activations else None)

    def __str__(self) -> str:
        weights = "none" if self.weights is None else str(self.weights)
        return weights if self.activations is None else f"{weights}/{self.activations}"

    def to_data(self) -> dict[str, Any]:
        """Plain data that means the same under any method's defaults, which a text does not."""
        parts = {"weights": self.weights, "activations": self.activations}
        return {key: spec.model_dump(mode="json") for key, spec in parts.items() if spec is not None}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Option":
        """What `to_data` gave."""
        weights, activations = (data.get(key) for key in ("weights", "activations"))
        return cls(
            None if weights is None else QuantSpec(**weights),
            None if activations is None else QuantSpec(**activations),
        )


@dataclass(frozen=True)
class Unit:
    """Layers that must have the same option, such as q, k and v; `parameters` counts their weights, tied ones once."""

    name: str
    layers: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Fixed:
    """A part that is not chosen for: its stored bits and why it stays as it is."""

    name: str
    bits: int
    reason: str


@dataclass(frozen=True)
class ScoreTable:
    """Scores and costs of each unit and option; infinite scores where a unit cannot have an option.

    `priority` orders units for solvers that need it (HAWQ-V2: the mean Hessian trace, largest first). `errors` are
    standard errors of the scores where they were estimated. `pairs[p][i, j]` is what units i and j cost together beyond
    the sum of their scores, when both have option p. `facts` say what was measured on what: they are the table's key.
    """

    units: tuple[Unit, ...]
    options: tuple[Option, ...]
    scores: Float[np.ndarray, "u p"]
    costs: Mapping[str, Float[np.ndarray, "u p"]]
    fixed: tuple[Fixed, ...] = ()
    priority: Float[np.ndarray, " u"] | None = None
    errors: Float[np.ndarray, "u p"] | None = None
    pairs: Mapping[int, Float[np.ndarray, "u u"]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that everything has a row for each unit and a column for each option."""
        shape = (len(self.units), len(self.options))
        for name, values in {"scores": self.scores, **self.costs}.items():
            if values.shape != shape:
                raise ShapeError(f"a table of {shape[0]} units and {shape[1]} options has {name} of {values.shape}")
        if np.isnan(self.scores).any():
            where = np.argwhere(np.isnan(self.scores))[0]
            raise InputError(f"the score of {self.units[where[0]].name} as {self.options[where[1]]} is not a number")

    @property
    def parameters(self) -> int:
        """Weights that are chosen for."""
        return sum(unit.parameters for unit in self.units)

    @property
    def fixed_bits(self) -> int:
        """Stored bits of everything that is not chosen for."""
        return sum(part.bits for part in self.fixed)

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers of all units."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    def size_for_bits(self, bits: float) -> float:
        """The size budget at which the chosen layers take `bits` a weight on average, everything stored counted."""
        return bits * self.parameters

    def size_for_bytes(self, size: float) -> float:
        """The size budget that lets the whole model take `size` bytes.

        Raises:
            InputError: what is fixed takes more than that.
        """
        left = 8 * size - self.fixed_bits
        if left <= 0:
            raise InputError(
                f"{size:.0f} bytes: the parts that are not quantized alone take {self.fixed_bits // 8}, such as "
                f"{max(self.fixed, key=lambda part: part.bits).name}; ask for more, or quantize them too"
            )
        return left

    def to_data(self) -> dict[str, Any]:
        """The table as plain data."""
        return {
            "schema": SCHEMA,
            "kind": "scores",
            "facts": dict(self.facts),
            "options": [option.to_data() for option in self.options],
            "units": [{"name": u.name, "layers": list(u.layers), "parameters": u.parameters} for u in self.units],
            "fixed": [{"name": part.name, "bits": part.bits, "reason": part.reason} for part in self.fixed],
            "scores": _rows(self.scores),
            "costs": {name: _rows(values) for name, values in self.costs.items()},
            "priority": None if self.priority is None else self.priority.tolist(),
            "errors": None if self.errors is None else _rows(self.errors),
            "pairs": {str(option): _rows(matrix) for option, matrix in self.pairs.items()},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "ScoreTable":
        """What `to_data` gave, perhaps through JSON.

        Raises:
            InputError: the data are no table of this schema.
        """
        if data.get("kind") != "scores" or data.get("schema") != SCHEMA:
            raise InputError(f"expected a table of scores of schema {SCHEMA}, got {data.get('kind')!r}")
        priority, errors = data["priority"], data["errors"]
        return cls(
            units=tuple(Unit(u["name"], tuple(u["layers"]), u["parameters"]) for u in data["units"]),
            options=tuple(Option.from_data(one) for one in data["options"]),
            scores=_array(data["scores"], np.inf),
            costs={name: _array(rows, np.inf) for name, rows in data["costs"].items()},
            fixed=tuple(Fixed(**part) for part in data["fixed"]),
            priority=None if priority is None else np.array(priority, dtype=np.float64),
            errors=None if errors is None else _array(errors, np.nan),
            pairs={int(option): _array(rows, 0.0) for option, rows in data["pairs"].items()},
            facts=data["facts"],
        )


def _rows(values: Float[np.ndarray, "u p"]) -> list[list[float | None]]:
    return [[float(x) if np.isfinite(x) else None for x in row] for row in values]


def _array(rows: Sequence[Sequence[float | None]], missing: float) -> Float[np.ndarray, "u p"]:
    return np.array([[missing if x is None else x for x in row] for row in rows], dtype=np.float64)
