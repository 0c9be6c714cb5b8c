"""The state of torch that statistics, solves and probes need."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import dither
from dither.engine.purpose import full_floats, precisely
from dither.methods.base import Prepared, Subject
from dither.methods.rtn import RTN


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def users_choice() -> Iterator[None]:
    before = allowed()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_reduced_precision_is_off_inside_and_the_users_choice_comes_back() -> None:
    with pytest.raises(KeyError), full_floats():
        assert allowed() == (False, False)
        raise KeyError
    assert allowed() == (True, True)
    assert precisely(lambda _: (*allowed(), torch.is_grad_enabled()), None) == (False, False, False)


def test_what_is_compared_before_the_walk_is_in_full_precision_too(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []

    def prepare(_self: RTN, _subject: Subject) -> Prepared:
        seen.append(allowed())
        return Prepared()

    monkeypatch.setattr(RTN, "prepare", prepare)
    network = tiny("ResNetForImageClassification")
    dither.quantize(network.model, "rtn", [network.batch(2)])
    dither.plan(network.model, "rtn", [network.batch(2)])
    assert seen == [(False, False)] * 2
    assert allowed() == (True, True)
