"""Memory that was freed goes back to the system."""

import ctypes
import subprocess
import sys

import psutil
import pytest
import torch

from dither import heap

AFTER_LARGER = """
import psutil, torch
from dither import heap
if {asked}:
    heap.map_large()
torch.ones(2**22)  # freed at once: from now on glibc would take less than 16 MiB from between what is in use
before = psutil.Process().memory_info().rss
tensors = [torch.ones(2**21) for _ in range(32)]
kept = tensors[::8]
tensors.clear()
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.fixture(autouse=True)
def glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("another C library")


def test_gaps_between_tensors_in_use_are_given_back() -> None:
    process = psutil.Process()
    tensors = [torch.ones(16, 1024) for _ in range(2048)]  # of 64 KiB, which are not mapped one by one
    kept = tensors[::64]
    tensors.clear()
    before = process.memory_info().rss
    heap.give_back_freed()
    assert before - process.memory_info().rss > 2**26
    assert all(bool((one == 1).all()) for one in kept)


def test_large_tensors_are_mapped_one_by_one_if_asked() -> None:
    left = [
        int(subprocess.run([sys.executable, "-c", AFTER_LARGER.format(asked=asked)], check=True, stdout=-1).stdout)
        for asked in (False, True)
    ]
    assert left[1] < 48 < 128 < left[0]


@pytest.mark.parametrize("step", [heap.give_back_freed, heap.map_large])
def test_another_c_library_is_left_alone(step, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    step()
