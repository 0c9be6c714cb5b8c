"""What became of a task that ran elsewhere: its result, or the error in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failed:
    """An error in the place of a result."""

    error: Exception


def tried(function: Callable[[T], R], task: T) -> R | Failed:
    """The result, or the error in its place: it is to be raised by whoever asked for the result."""
    try:
        return function(task)
    except Exception as error:
        return Failed(error)
