"""Memory that was freed, and how glibc keeps it: in gaps between what is in use, for tensors of a hundred sizes."""

import ctypes
from contextlib import suppress

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
LARGE = 2**22  # bytes


def give_back_freed() -> None:
    """Let glibc return the free pages that it keeps; with another C library nothing happens.

    The gaps of a walk grow to a third of a model if nobody asks.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def map_large() -> None:
    """Let glibc map tensors of 4 MiB and more one by one, so that each goes back to the system as soon as it is free.

    It holds for the whole process and cannot be undone, so it is for programs, not for a library: `dither` the command
    does it. glibc would raise the limit to 32 MiB by itself.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)
