"""Surrogate search: boosted trees learn what configurations cost, and the one they think best is tried next.

Source: Lee et al., Quantune, 2022, arXiv 2202.05048: five random configurations, then fit, measure the best predicted,
fit again; in the transfer variant the trees begin with the trials of other models, told apart by features of the model.
Settings of the trees from the authors' released latency tuner: rate 0.1, depth 6, reg_alpha 0.01, subsample 0.79,
columns 0.9, 200 rounds.
Departs from the paper: no early stopping, for which a handful of trials leaves nothing to validate on; the cost is
what is lost against full precision, so that models of other accuracy are of use; whatever is equally good by the
trees is drawn at random; measured points leave the pool (in the released tuner they stay).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dither.errors import DependencyError, InputError
from dither.tuning.encoding import Encoder, joined
from dither.tuning.space import Space, Value
from dither.tuning.strategy import Strategy
from dither.tuning.trial import penalized

TREES: dict[str, Any] = {
    "eta": 0.1, "max_depth": 6, "gamma": 0, "alpha": 0.01, "subsample": 0.79, "colsample_bytree": 0.9,
    "objective": "reg:squarederror", "nthread": 1, "verbosity": 0,
}  # fmt: skip
ROUNDS = 200


@dataclass(frozen=True)
class Earlier:
    """A trial of another model: its configuration, cost (in the unit of the new run's) and the model's features."""

    configuration: Mapping[str, Value]
    cost: float
    features: Mapping[str, float] = field(default_factory=dict)


class Surrogate(Strategy):
    """The best by boosted trees, or with probability `epsilon` any; the `first` ones are random without `earlier`."""

    name: ClassVar[str] = "xgboost"

    def __init__(
        self, space: Space, seed: int = 0, features: Mapping[str, float] | None = None, earlier: Sequence[Earlier] = (),
        first: int = 5, epsilon: float = 0.05,
    ) -> None:  # fmt: skip
        super().__init__(space, seed)
        self.first, self.epsilon, self.features = first, epsilon, dict(features or {})
        names = sorted({name for one in earlier for name in one.features} | set(self.features)) if earlier else []
        self.encoder = Encoder(joined(space.dimensions, [one.configuration for one in earlier]), tuple(names))
        if any(not self.encoder.knows(one.configuration) for one in earlier):
            raise InputError(f"earlier trials need values of {', '.join(space.names)}")
        self.rows = np.array([self.encode(space.configuration(point)) for point in space.points])
        self.known = np.array([self.encoder.encode(one.configuration, one.features) for one in earlier])
        self.costs = np.array([one.cost for one in earlier], dtype=np.float64)

    def encode(self, configuration: Mapping[str, Value]) -> list[float]:
        """A row of this model's."""
        return self.encoder.encode(configuration, self.features)

    def choose(self, left: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
        """The best predicted ones, with a few random ones between."""
        order = [left[int(k)] for k in generator.permutation(len(left))]
        if len(self.trials) < self.first and not len(self.costs):
            return order[:count]
        predicted = self.predict(generator)
        ranked = sorted(order, key=lambda number: float(predicted[number]))  # stable, so ties stay in random order
        chosen: list[int] = []
        for _ in range(count):
            source = order if generator.random() < self.epsilon else ranked
            chosen.append(next(number for number in source if number not in chosen))
        return chosen

    def predict(self, generator: np.random.Generator) -> NDArray[np.float32]:
        """The cost of every point of the space, by trees that know all trials."""
        own = [self.rows[self.space.index[trial.point]] for trial in self.trials]
        rows = np.concatenate([np.array(part) for part in (self.known, own) if len(part)])
        costs = np.concatenate([self.costs, penalized(self.trials)])
        xgboost = package()
        settings = {**TREES, "seed": int(generator.integers(2**31))}
        trees = xgboost.train(settings, xgboost.DMatrix(rows, label=costs), ROUNDS)
        return np.asarray(trees.predict(xgboost.DMatrix(self.rows)))


def package() -> Any:
    """XGBoost.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import xgboost
    except ImportError as error:
        raise DependencyError(
            f"strategy xgboost needs the package xgboost: pip install 'dither[tune]', or --strategy genetic ({error})"
        ) from error
    return xgboost
