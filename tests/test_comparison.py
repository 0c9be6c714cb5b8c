"""What `compare` runs, and how its rows are told apart."""

import pytest

from dither.comparison import _jobs
from dither.errors import InputError
from dither.methods import ERQ, RTN


def test_configured_methods_of_one_name_get_labels_of_their_own() -> None:
    jobs = _jobs([ERQ(), RTN(), ERQ(dual=False), ERQ(absorb=False)], [], [])
    assert [label for label, _ in jobs] == ["erq", "rtn", "erq #2", "erq #3"]


def test_a_named_method_is_run_with_every_format_and_none_is_refused() -> None:
    jobs = _jobs(["rtn"], ["int3", "int4"], ["int4", "int8"])
    assert [(str(method.weights.bits), method.activations.bits) for _, method in jobs if method.activations] == [
        ("3", 4), ("3", 8), ("4", 4), ("4", 8),
    ]  # fmt: skip
    with pytest.raises(InputError, match="at least one method"):
        _jobs([], [], [])
