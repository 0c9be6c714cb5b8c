"""What all tasks of a run share, made once by each worker: a function may hold a whole model."""

from collections.abc import Callable
from typing import Any

_HELD: list[tuple[str, Any]] = []  # a worker's own; the last one alone


def held(key: str, load: Callable[[], Any]) -> Any:
    """What was loaded under a key, in place of what was held before."""
    if not _HELD or _HELD[0][0] != key:
        _HELD.clear()  # two models at once would double the memory
        _HELD.append((key, load()))
    return _HELD[0][1]
