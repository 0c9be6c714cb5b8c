"""Memory that was freed goes back to the system."""

import ctypes
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def mapped(path: Path) -> torch.Tensor:
    """16 MiB that are read from a mapped file, all of them in memory."""
    save_file({"weight": torch.arange(2**22, dtype=torch.float32)}, path)
    with safe_open(path, "pt") as file:
        weight: torch.Tensor = file.get_tensor("weight")
    if not any(start <= weight.data_ptr() < stop for start, stop in heap._mapped_files()):
        pytest.skip("read, not mapped")
    assert float(weight.double().sum()) > 0
    return weight


def resident() -> int:
    """Bytes of the process that lie in memory."""
    return int(psutil.Process().memory_info().rss)


def test_pages_of_a_mapped_file_are_given_back_and_hold_what_they_held(tmp_path: Path) -> None:
    first, before = mapped(tmp_path / "first.safetensors"), resident()
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    start = -(-first.data_ptr() // 2**16) * 2**16
    if advise is None or advise(ctypes.c_void_p(start), ctypes.c_size_t(2**23), 21) or before - resident() < 2**22:
        pytest.skip("this system does not page out when it is asked to")
    weight = mapped(tmp_path / "second.safetensors")
    weight[: 2**19].mul_(2)  # pages of our own: they are not the file's any more
    total, before = float(weight.double().sum()), resident()
    heap.give_back_mapped(heap.ranges_of([weight]))
    assert before - resident() > 2**23  # of 14 MiB
    assert float(weight.double().sum()) == total


def test_memory_without_a_file_keeps_its_pages() -> None:
    tensor = torch.ones(2**22)
    heap.give_back_mapped(heap.ranges_of([tensor, torch.ones(0)]))
    assert bool((tensor == 1).all())


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heap, "_MAPS", tmp_path / "nothing")
    heap.give_back_mapped([(0, 2**30)])
