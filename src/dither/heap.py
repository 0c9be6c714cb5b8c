"""Memory that was freed, and how glibc keeps it: in gaps between what is in use, for tensors of a hundred sizes."""

import ctypes
from contextlib import suppress


def give_back_freed() -> None:
    """Let glibc return the free pages that it keeps; with another C library nothing happens.

    The gaps of a walk grow to a third of a model if nobody asks. (Mapping tensors from 4 MiB on one by one would leave
    none, but takes a fifth more time on models of 40 to 135 M parameters; of larger ones most are mapped anyway.)
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
