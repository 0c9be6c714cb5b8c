"""Allocation: the format that each layer gets, what that costs, and how good it is proven to be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dither.allocation.problem import Problem, Solution
from dither.allocation.table import SIZE, Fixed, Option, ScoreTable
from dither.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class Allocation:
    """One option a unit, and by it one a layer.

    `requested` and `achieved` are by resource, size in bits of the chosen layers with all that is stored for them;
    `bits` is the achieved average a weight. `bound`: no choice within the budgets scores less (None: nothing is known).
    """

    layers: Mapping[str, Option]
    units: Mapping[str, Option]
    requested: Mapping[str, float]
    achieved: Mapping[str, float]
    parameters: int
    score: float
    bound: float | None
    gap: float | None
    solver: str
    status: str
    fixed: tuple[Fixed, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, table: ScoreTable, problem: Problem, solution: Solution) -> "Allocation":
        """What a solution of a table's problem means."""
        chosen = {unit.name: table.options[option] for unit, option in zip(table.units, solution.choice, strict=True)}
        known = math.isfinite(solution.bound)
        return cls(
            layers={layer: chosen[unit.name] for unit in table.units for layer in unit.layers},
            units=chosen,
            requested=dict(problem.budgets),
            achieved=problem.spent(solution.choice),
            parameters=table.parameters,
            score=solution.score,
            bound=solution.bound if known else None,
            gap=solution.gap if known else None,
            solver=solution.solver,
            status=solution.status,
            fixed=table.fixed,
            facts=dict(table.facts),
        )

    @property
    def bits(self) -> float:
        """Stored bits a weight of the chosen layers, on average."""
        return self.achieved[SIZE] / self.parameters if self.parameters and SIZE in self.achieved else 0.0

    @property
    def size_bytes(self) -> float:
        """Of the whole model, what is fixed included."""
        return (self.achieved.get(SIZE, 0.0) + sum(part.bits for part in self.fixed)) / 8

    @property
    def fixed_share(self) -> float:
        """Of the whole model's bytes, how much is not chosen for."""
        return sum(part.bits for part in self.fixed) / (8 * self.size_bytes) if self.size_bytes else 0.0

    def overrides(self) -> dict[str, dict[str, Any]]:
        """The weight format of each layer as the `overrides` of a method's recipe."""
        return {
            name: option.weights.model_dump(mode="json")
            for name, option in self.layers.items()
            if option.weights is not None
        }

    def kept(self) -> list[str]:
        """Layers that stay in full precision: the `skip` of a recipe."""
        return [name for name, option in self.layers.items() if option.weights is None]

    def to_data(self) -> dict[str, Any]:
        """Plain data for a YAML or JSON file."""
        options = list(dict.fromkeys(str(option) for option in self.units.values()))
        data = {str(option): option.to_data() for option in self.units.values()}
        return {
            "schema": SCHEMA,
            "kind": "allocation",
            "requested": dict(self.requested),
            "achieved": dict(self.achieved),
            "bits": self.bits,
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "fixed_share": self.fixed_share,
            "score": self.score,
            "bound": self.bound,
            "gap": self.gap,
            "solver": self.solver,
            "status": self.status,
            "facts": dict(self.facts),
            "options": {name: data[name] for name in options},
            "units": {name: str(option) for name, option in self.units.items()},
            "layers": {name: str(option) for name, option in self.layers.items()},
            "fixed": [{"name": part.name, "bits": part.bits, "reason": part.reason} for part in self.fixed],
        }

    @classmethod
    def from_data(cls, data: Any, where: str = "the allocation") -> "Allocation":
        """What `to_data` gave, through YAML or JSON.

        Raises:
            InputError: the data are no allocation of this schema.
        """
        if not isinstance(data, Mapping) or data.get("kind") != "allocation":
            raise InputError(f"{where} is no allocation: expected a file that `dither allocate` wrote")
        if data.get("schema") != SCHEMA:
            raise InputError(f"{where}: expected allocation schema {SCHEMA}, got {data.get('schema')}; update dither")
        try:
            options = {name: Option.from_data(one) for name, one in data["options"].items()}
            return cls(
                layers={name: options[text] for name, text in data["layers"].items()},
                units={name: options[text] for name, text in data["units"].items()},
                fixed=tuple(Fixed(**part) for part in data["fixed"]),
                **{key: data[key] for key in _PLAIN},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where} is damaged: {type(error).__name__} {error}") from None


_PLAIN = ("requested", "achieved", "parameters", "score", "bound", "gap", "solver", "status", "facts")
