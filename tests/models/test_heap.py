"""Memory that was freed, given back to the system."""

import psutil
import pytest
import torch

from dither.models import heap


def test_gaps_between_tensors_in_use_are_given_back() -> None:
    if heap._trimmer() is None:
        pytest.skip("this C library has no malloc_trim")
    process = psutil.Process()
    tensors = [torch.ones(16, 1024) for _ in range(2048)]  # of 64 KiB, which are not mapped one by one
    kept = tensors[::64]
    tensors.clear()
    before = process.memory_info().rss
    heap.give_back_freed()
    assert before - process.memory_info().rss > 2**26
    assert all(bool((one == 1).all()) for one in kept)


def test_a_system_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_trimmer", lambda: None)
    heap.give_back_freed()
