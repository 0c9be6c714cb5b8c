"""Memory that is not needed any more goes back to the system.

glibc keeps what was freed, in gaps between what is in use, for tensors of a hundred sizes. Weights that are read from a
mapped file stay in memory as long as any tensor of the file does.
"""

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from torch import Tensor

_PAGE_OUT = 21  # of madvise, Linux 5.4; what a page holds is read from its file again when it is asked for
_MAPS = Path("/proc/self/maps")
Range = tuple[int, int]  # of addresses, the end outside


def give_back_freed() -> None:
    """Let glibc return the free pages that it keeps; with another C library nothing happens.

    The gaps of a walk grow to a third of a model if nobody asks. (Mapping tensors from 4 MiB on one by one would leave
    none, but takes a fifth more time on models of 40 to 135 M parameters; of larger ones most are mapped anyway.)
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def ranges_of(tensors: Iterable[Tensor]) -> list[Range]:
    """Where the tensors lie in the processor's memory."""
    return [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors if x.device.type == "cpu" and x.data_ptr()]


def give_back_mapped(ranges: Iterable[Range]) -> None:
    """Let Linux drop the pages of these addresses that hold a file's bytes; with another system nothing happens.

    Nothing is lost, even where somebody still holds the tensors or has changed them.
    """
    with suppress(AttributeError, OSError, TypeError, ValueError):
        advise = ctypes.CDLL(None).madvise
        files = list(_mapped_files())
        for first, last in ranges:
            for start, stop in files:
                low, high = _whole_pages(max(first, start), min(last, stop))
                if low < high:
                    advise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), _PAGE_OUT)


def _mapped_files() -> Iterator[Range]:
    for line in _MAPS.read_text().splitlines():
        addresses, _, _, _, node, *_ = line.split()
        if node != "0":
            low, high = addresses.split("-")
            yield int(low, 16), int(high, 16)


def _whole_pages(low: int, high: int) -> Range:
    return -(-low // mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE
