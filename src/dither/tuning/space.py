"""Space: which whole-model configurations there are to choose from, one value for each dimension.

Source: Lee et al., Quantune: Post-training Quantization of Convolutional Neural Networks using Extreme Gradient
Boosting for Fast Deployment, 2022, arXiv 2202.05048: calibration size × scheme × clipping × granularity × mixed ends.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from dither.errors import InputError

Value = str | int | float
Point = tuple[Value, ...]  # one value for each dimension, in their order
LARGEST = 50_000  # configurations that are held and predicted at once


@dataclass(frozen=True)
class Dimension:
    """A name and the values that it can take; numbers are ordered, texts are not."""

    name: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError(f"dimension {self.name!r} has no value; give at least one")
        if len(set(self.values)) != len(self.values):
            raise InputError(f"dimension {self.name!r} names a value twice: {', '.join(map(str, self.values))}")

    @property
    def ordered(self) -> bool:
        """Whether its values are positive numbers, which a threshold can part."""
        return all(isinstance(value, int | float) and value > 0 for value in self.values)


@dataclass(frozen=True)
class Space:
    """The points that are allowed, in the order of a nested loop whose last dimension runs fastest."""

    dimensions: tuple[Dimension, ...]
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise InputError("the space holds no configuration; give more values")

    @classmethod
    def of(cls, dimensions: Sequence[Dimension], allowed: Callable[[dict[str, Value]], bool] | None = None) -> "Space":
        """All combinations that `allowed` lets pass.

        Raises:
            InputError: there are none, or more than can be held.
        """
        count = prod(len(dimension.values) for dimension in dimensions)
        if count > LARGEST:
            raise InputError(f"the space has {count:,} combinations, more than {LARGEST:,}; give fewer values")
        names = [dimension.name for dimension in dimensions]
        points = product(*(dimension.values for dimension in dimensions))
        kept = tuple(p for p in points if allowed is None or allowed(dict(zip(names, p, strict=True))))
        return cls(tuple(dimensions), kept)

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def index(self) -> Mapping[Point, int]:
        """The number of each point."""
        return {point: number for number, point in enumerate(self.points)}

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions' names."""
        return tuple(dimension.name for dimension in self.dimensions)

    def configuration(self, point: Point) -> dict[str, Value]:
        """A point with the names of its dimensions."""
        return dict(zip(self.names, point, strict=True))

    def point(self, configuration: Mapping[str, Value]) -> Point:
        """The point of a configuration.

        Raises:
            InputError: it lacks a dimension, has another one, or is not in the space.
        """
        if set(configuration) != set(self.names):
            raise InputError(f"expected values of {', '.join(self.names)}, got {', '.join(configuration)}")
        point = tuple(configuration[name] for name in self.names)
        if point not in self.index:
            raise InputError(f"{dict(configuration)} is not in the space")
        return point
