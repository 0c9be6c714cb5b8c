"""Parked activations: values survive the disk, the budget holds, what others own is left alone, files go away."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from dither.models.spill import Spill, tensors_in


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def files(spill: Spill) -> list[Path]:
    return [] if spill._folder is None else list(Path(spill._folder.name).iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_a_parked_tensor_comes_back_bit_by_bit_with_all_its_views(dtype: torch.dtype) -> None:
    x = (drawn(6, 5) * 3).to(dtype)
    view, expected = x.T[1:4], x.clone()
    with Spill(0) as spill:
        spill.park(({"x": x}, [view]))
        assert x.untyped_storage().nbytes() == 0
        assert len(files(spill)) == 1
        spill.fetch(((view,),))
        assert torch.equal(x, expected)
        assert torch.equal(view, expected.T[1:4])
        assert files(spill) == []


def test_what_fits_the_budget_stays_in_memory_and_the_rest_goes_to_disk() -> None:
    parts = [drawn(100) for _ in range(4)]
    with Spill(900) as spill:
        spill.park(parts)
        assert [part.untyped_storage().nbytes() for part in parts] == [400, 400, 0, 0]
        assert (spill.in_memory, spill.spilled) == (800, 2)
        spill.fetch(parts[0])
        assert spill.in_memory == 400
        spill.park(parts[0])
        assert (spill.in_memory, spill.spilled) == (800, 2)


def test_parking_or_fetching_twice_changes_nothing() -> None:
    x = drawn(10)
    expected = x.clone()
    with Spill(0) as spill:
        spill.fetch(x)
        spill.park(x)
        spill.park(x)
        spill.fetch(x)
        spill.fetch(x)
        assert torch.equal(x, expected)
        assert spill.in_memory == 0


def test_protected_and_empty_tensors_stay() -> None:
    x = drawn(4, 4)
    with Spill(0, [x]) as spill:
        spill.park([x[1], torch.empty(0), None, "text", 3])
        assert spill.spilled == 0
        assert x.untyped_storage().nbytes() == 64


def test_a_protected_tensor_may_go_and_what_takes_its_place_is_parked_again() -> None:
    x, other = drawn(4, 4), drawn(4, 4)
    with Spill(0, [x]) as spill:
        held = weakref.ref(x)
        spill._protected[other.untyped_storage().data_ptr()] = spill._protected[x.untyped_storage().data_ptr()]
        del x
        assert held() is None
        spill.park(other)
        assert spill.spilled == 1


def test_the_folder_is_gone_afterwards_even_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), Spill(0) as spill:
        spill.park(drawn(3))
        folder = Path(spill._folder.name)  # type: ignore[union-attr]
        assert folder.is_dir()
        raise RuntimeError("stop")
    assert not folder.exists()


def test_tensors_are_found_in_nests_and_views_counted_once() -> None:
    x, y = drawn(3), drawn(2)
    nest: Any = {"a": [x, (x[1:], {"b": y})], "c": None}
    assert [found.data_ptr() for found in tensors_in(nest)] == [x.data_ptr(), y.data_ptr()]
