"""Search over whole-model configurations: spaces, strategies and the loop, without a model in sight."""

from collections.abc import Mapping, Sequence

from dither.errors import InputError, nearest
from dither.tuning.genetic import Genetic
from dither.tuning.grid_search import GridSearch
from dither.tuning.random_search import RandomSearch
from dither.tuning.space import Space
from dither.tuning.strategy import Strategy
from dither.tuning.surrogate import Earlier, Surrogate, package

STRATEGIES: dict[str, type[Strategy]] = {
    one.name: one for one in (Surrogate, RandomSearch, GridSearch, Genetic)
}  # fmt: skip


def check_strategy(name: str, learns: bool = False) -> None:
    """Refuse a strategy that does not exist, whose package is absent, or that cannot learn from earlier trials.

    Raises:
        InputError, DependencyError: as said.
    """
    if name not in STRATEGIES:
        raise InputError(f"expected strategy {', '.join(STRATEGIES)}; got {name!r}{nearest(name, STRATEGIES)}")
    if name == Surrogate.name:
        package()
    elif learns:
        raise InputError(f"strategy {name} learns nothing from earlier trials; use --strategy {Surrogate.name}")


def make_strategy(
    name: str, space: Space, seed: int = 0, features: Mapping[str, float] | None = None, earlier: Sequence[Earlier] = ()
) -> Strategy:
    """A strategy by its name; `features` and `earlier` are of use to the surrogate alone.

    Raises:
        InputError: there is no such strategy, or it cannot learn from `earlier` trials.
        DependencyError: its package is not installed.
    """
    check_strategy(name, bool(earlier))
    return Surrogate(space, seed, features, earlier) if name == Surrogate.name else STRATEGIES[name](space, seed)
