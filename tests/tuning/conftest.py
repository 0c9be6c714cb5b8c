"""Small spaces whose costs are a known function, and a search that is played on them."""

from collections.abc import Callable

import pytest

from dither.tuning import make_strategy
from dither.tuning.loop import search
from dither.tuning.space import Dimension, Point, Space
from dither.tuning.strategy import Strategy
from dither.tuning.trial import Outcome, Task, Trial

Play = Callable[..., list[Trial]]


@pytest.fixture
def space() -> Space:
    """96 points: five dimensions of texts and numbers."""
    return Space.of([
        Dimension("samples", (1, 8, 64)), Dimension("scheme", ("asym", "sym", "pow2", "twin")),
        Dimension("clip", ("no", "yes")), Dimension("grain", ("tensor", "channel")), Dimension("ends", ("kept", "all")),
    ])  # fmt: skip


def cost(point: Point) -> float:
    """Additive effects and one interaction; 0 at the best point and nowhere else."""
    samples, scheme, clip, grain, ends = point
    best = {"asym": 0.0, "sym": 2.0, "pow2": 5.0, "twin": 3.0}[str(scheme)] + {1: 2.0, 8: 0.5, 64: 0.0}[int(samples)]
    best += 3.0 * (grain == "tensor") + 1.0 * (ends == "all")
    return best + (1.5 if (clip == "yes") == (grain == "tensor") else 0.0) * 0.5


def task(number: int, point: Point) -> Task:
    return Task(number, {}, "rtn", {"point": point}, 1, 0)


def measured(tasks: list[Task]) -> list[Outcome]:
    return [Outcome(one.number, {"cost": cost(one.fields["point"])}) for one in tasks]


def judged(outcome: Outcome, point: Point) -> Trial:
    return Trial(outcome.number, point, outcome.figures["cost"])


@pytest.fixture
def play(space: Space) -> Play:
    """Search the space with a strategy: `play("random", seed=1, count=20, batch=3, known={…})`."""

    def run(strategy: str | Strategy, seed: int = 0, count: int = 96, **options: object) -> list[Trial]:
        searcher = make_strategy(strategy, space, seed) if isinstance(strategy, str) else strategy
        return search(searcher, count, task, lambda tasks: iter(measured(list(tasks))), judged, **options)  # type: ignore[arg-type]

    return run
