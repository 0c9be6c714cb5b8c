"""The largest memory that a piece of work takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_HIGHEST = "5"  # what Linux is told to forget: the highest resident size so far


@dataclass
class Peak:
    """Bytes at the highest, the whole process's on a CPU; None where the system cannot tell."""

    nbytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure what is open; on a GPU what torch has allocated there, else resident memory."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    known = _forget()
    yield peak
    peak.nbytes = _highest() if known else None


def _forget() -> bool:
    try:
        _RESET.write_text(_HIGHEST)
    except OSError:  # another system, or a sandbox
        return False
    return True


def _highest() -> int | None:
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else 1024 * int(line.split()[1])
