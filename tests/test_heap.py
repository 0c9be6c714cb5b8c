"""Memory that was freed goes back to the system."""

import ctypes

import psutil
import pytest
import torch

from dither import heap


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


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap.give_back_freed()
