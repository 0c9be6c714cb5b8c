"""A plain sum of numbers, such as squared errors batch by batch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Total:
    """The sum so far."""

    value: float

    def merge(self, other: "Total") -> "Total":
        """The sum of both."""
        return Total(self.value + other.value)
