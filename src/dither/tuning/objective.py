"""What a search is for: the figure to improve, the limits to keep, and one cost that makes models comparable."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dither.errors import InputError, nearest

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Quantity:
    """A figure of a trial. `cost` gives what is lost against the full-precision model (figures, reference)."""

    figure: str
    higher_is_better: bool
    cost: Callable[[float, float | None], float]


QUANTITIES: dict[str, Quantity] = {
    "accuracy": Quantity("top1", True, lambda value, full: (full or 0.0) - value),
    "perplexity": Quantity("perplexity", False, lambda value, full: math.log(value) - math.log(full or 1.0)),
    "kl": Quantity("kl", False, lambda value, full: value),
    "size": Quantity("size_bytes", False, lambda value, full: value / (full or 1.0)),
}


@dataclass(frozen=True)
class Limit:
    """A bound that trials must keep: `name` of a quantity, and the worst value that is allowed."""

    name: str
    bound: float

    def violation(self, figures: Figures) -> float:
        """By what share of the bound it is broken; 0 if it is kept, infinite if the figure is not known."""
        quantity = QUANTITIES[self.name]
        value = figures.get(quantity.figure)
        if value is None:
            return math.inf
        excess = self.bound - value if quantity.higher_is_better else value - self.bound
        return max(0.0, excess / max(abs(self.bound), 1e-12))


@dataclass(frozen=True)
class Objective:
    """The quantity to improve and the limits."""

    name: str
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        known(self.name, "objective")
        if self.name == "size" and all(limit.name == "size" for limit in self.limits):
            raise InputError("objective size needs a limit of quality, such as accuracy=0.85, perplexity=20 or kl=0.1")

    @property
    def quantity(self) -> Quantity:
        """What is to be improved."""
        return QUANTITIES[self.name]

    def check(self, reference: Figures) -> None:
        """Refuse quantities that the data do not give, which the figures of full precision show.

        Raises:
            InputError: the objective or a limit is of one.
        """
        there = [name for name, one in QUANTITIES.items() if reference.get(one.figure) is not None]
        for name in (self.name, *(limit.name for limit in self.limits)):
            if name not in there:
                raise InputError(
                    f"the data that judge give no {name}, only {', '.join(there)}; give others with --data"
                )

    def cost(self, figures: Figures, reference: Figures) -> float | None:
        """What is to be lowered; None where it was not measured or is not finite."""
        value, full = figures.get(self.quantity.figure), reference.get(self.quantity.figure)
        if value is None or not math.isfinite(value) or (self.name == "perplexity" and value <= 0):
            return None
        return self.quantity.cost(value, full)

    def tie(self, figures: Figures) -> float:
        """What decides between equal costs, such as the same share of few pictures: divergence, else bytes."""
        decisive = [figures.get(QUANTITIES[name].figure) for name in ("kl", "size") if name != self.name]
        return next((value for value in decisive if value is not None and math.isfinite(value)), 0.0)

    def violation(self, figures: Figures) -> float:
        """The sum over the limits."""
        return math.fsum(limit.violation(figures) for limit in self.limits)


def known(name: str, what: str) -> str:
    """The name of a quantity.

    Raises:
        InputError: there is none of that name.
    """
    if name not in QUANTITIES:
        raise InputError(f"expected {what} to be {', '.join(QUANTITIES)}; got {name!r}{nearest(name, QUANTITIES)}")
    return name


def read_limits(texts: Sequence[str]) -> tuple[Limit, ...]:
    """Limits from texts such as `size=20MB`, `accuracy=0.85`, `accuracy=85%`.

    Raises:
        InputError: no such quantity, no number, or one quantity twice.
    """
    limits = tuple(_limit(text) for text in texts)
    names = [limit.name for limit in limits]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"limit {twice[0]!r} is given twice")
    return limits


def _limit(text: str) -> Limit:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise InputError(f"expected a limit such as size=20MB or accuracy=0.85, got {text!r}")
    known(name, "limit")
    matched = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?)\s*([a-z%]*)", value.lower())
    try:
        number = float(matched[1]) if matched else math.nan
    except ValueError:
        number = math.nan
    unit = matched[2] if matched else ""
    factor = (UNITS.get(unit) if name == "size" else {"": 1.0, "%": 0.01}.get(unit)) or math.nan
    bound = number * factor
    if not math.isfinite(bound) or bound <= 0 or (name == "accuracy" and bound > 1):
        example = {"size": "20MB", "accuracy": "0.85", "perplexity": "20", "kl": "0.1"}[name]
        raise InputError(f"limit {text!r}: expected a value such as {name}={example}")
    return Limit(name, bound)
