"""Memory that was freed, given back to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back_freed() -> None:
    """Let glibc return the pages that it keeps between what is in use; elsewhere nothing happens.

    A walk frees tensors of many sizes in turn, whose gaps grow to a third of a model if nobody asks.
    """
    trim = _trimmer()
    if trim is not None:
        trim(0)


@cache
def _trimmer() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None
    return found
