"""Genetic search: children of the best configurations so far, each value from one of two parents, some changed.

Source: the genetic baseline of Quantune (arXiv 2202.05048): population 10, tournament, uniform crossover, mutation 0.1.
[choice] One child at a time joins the ten best of all trials (steady state), and none is measured twice.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from dither.tuning.space import Point, Space
from dither.tuning.strategy import Strategy
from dither.tuning.trial import Trial

TRIES = 100  # children that are no new point of the space before one is drawn at random


class Genetic(Strategy):
    """Evolution of the `population` best trials."""

    name: ClassVar[str] = "genetic"

    def __init__(self, space: Space, seed: int = 0, population: int = 10, mutation: float = 0.1) -> None:
        super().__init__(space, seed)
        self.population, self.mutation = population, mutation

    def choose(self, left: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
        """Random points until there is a population, then children."""
        if len(self.trials) < self.population:
            return [left[int(k)] for k in generator.permutation(len(left))[:count]]
        parents = sorted(self.trials, key=lambda trial: (trial.rank, trial.number))[: self.population]
        free, chosen = set(left), list[int]()
        while len(chosen) < count:
            number = self.child(parents, free, generator)
            free.remove(number)
            chosen.append(number)
        return chosen

    def child(self, parents: Sequence[Trial], free: set[int], generator: np.random.Generator) -> int:
        """A point that is still free: of two tournament winners, or any where the crossing finds none."""
        for _ in range(TRIES):
            one, other = self.winner(parents, generator), self.winner(parents, generator)
            number = self.space.index.get(self.crossed(one, other, generator))
            if number in free and number is not None:
                return number
        return sorted(free)[int(generator.integers(len(free)))]

    def winner(self, parents: Sequence[Trial], generator: np.random.Generator) -> Point:
        """The better of two that are drawn; `parents` are in order."""
        return parents[int(generator.integers(len(parents), size=2).min())].point

    def crossed(self, one: Point, other: Point, generator: np.random.Generator) -> Point:
        """Each value from either parent, a few drawn anew."""
        point = []
        for mine, yours, dimension in zip(one, other, self.space.dimensions, strict=True):
            value = mine if generator.random() < 0.5 else yours
            if generator.random() < self.mutation:
                value = dimension.values[int(generator.integers(len(dimension.values)))]
            point.append(value)
        return tuple(point)
