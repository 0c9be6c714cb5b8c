"""Configurations as rows of numbers: a logarithm for each ordered dimension, one column a value for the others."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dither.tuning.space import Dimension, Value

Rows = NDArray[np.float64]
UNKNOWN = math.nan  # of a feature that a model is not known to have; trees send it their default way


@dataclass(frozen=True)
class Encoder:
    """Rows hold the dimensions' columns, then the `features` of the model that a configuration is for."""

    dimensions: tuple[Dimension, ...]
    features: tuple[str, ...] = ()

    def encode(self, configuration: Mapping[str, Value], features: Mapping[str, float] | None = None) -> list[float]:
        """One row."""
        row: list[float] = []
        for dimension in self.dimensions:
            value = configuration[dimension.name]
            if dimension.ordered:
                row.append(math.log2(float(value)))
            else:
                row += [float(value == one) for one in dimension.values]
        return row + [(features or {}).get(name, UNKNOWN) for name in self.features]

    def decode(self, row: Sequence[float]) -> dict[str, Value]:
        """The configuration whose columns are nearest to a row's."""
        configuration: dict[str, Value] = {}
        start = 0
        for dimension in self.dimensions:
            if dimension.ordered:
                logarithm, width = row[start], 1
                chosen = min(dimension.values, key=lambda value: abs(math.log2(float(value)) - logarithm))
            else:
                width = len(dimension.values)
                chosen = dimension.values[int(np.argmax(row[start : start + width]))]
            configuration[dimension.name] = chosen
            start += width
        return configuration

    def knows(self, configuration: Mapping[str, Value]) -> bool:
        """Whether every dimension has a value that can be encoded."""
        return all(
            dimension.name in configuration
            and (
                isinstance(configuration[dimension.name], int | float) and float(configuration[dimension.name]) > 0
                if dimension.ordered
                else True
            )
            for dimension in self.dimensions
        )


def joined(dimensions: Sequence[Dimension], others: Sequence[Mapping[str, Value]]) -> tuple[Dimension, ...]:
    """The dimensions with the values that configurations of other runs add, so that both can be encoded."""
    return tuple(
        Dimension(one.name, tuple(dict.fromkeys([*one.values, *(c[one.name] for c in others if one.name in c)])))
        for one in dimensions
    )
