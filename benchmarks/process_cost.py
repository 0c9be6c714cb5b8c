"""What a piece of work costs this process: seconds, processor seconds and memory. Needs nothing but Python on Linux."""

import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class Cost:
    """Counting starts when it is made; `facts` says what was used since then."""

    def __init__(self) -> None:
        with suppress(OSError):  # some sandboxes refuse; the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
        self.resident, self.wall, self.work = _bytes("VmRSS"), time.perf_counter(), _processor_seconds()

    def facts(self) -> dict[str, Any]:
        """`cpu_s` is summed over threads; it hardly depends on what else the machine does, as `time_s` does."""
        return {
            "time_s": time.perf_counter() - self.wall,
            "cpu_s": _processor_seconds() - self.work,
            "peak_bytes": _bytes("VmHWM") - self.resident,
        }


def _bytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
