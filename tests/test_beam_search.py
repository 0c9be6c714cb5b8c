"""The beam search on a network: budgets are kept, figures are real evaluations, and it goes on where it stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.test_by_classes import OPTIONS, divergence

import dither
from dither.allocation.table import SIZE
from dither.beam_search import allocate_by_beam
from dither.errors import InputError
from dither.provenance import model_sha256


def test_the_choice_is_evaluated_and_no_worse_than_that_of_sums(odd: Callable[..., Any]) -> None:
    network = odd(depth=2)
    data, before = network.batch(32, seed=1), model_sha256(network.model.state_dict().items())
    table, found = allocate_by_beam(network.model, [data], "dp-beam+every=3", bits=8.0, options=OPTIONS)
    assert model_sha256(network.model.state_dict().items()) == before
    assert found.achieved[SIZE] <= found.requested[SIZE]
    assert found.solver == "dp-beam" and str(table.facts["evaluations"]) in found.status
    sums = dither.allocate(table, bits=8.0)
    mine = divergence(network, data, found.layers)
    assert mine == pytest.approx(table.facts["kl"], rel=1e-4)
    other = odd(depth=2)
    assert mine <= divergence(other, data, sums.layers)


def test_evaluations_are_kept_for_a_search_that_was_interrupted(odd: Callable[..., Any], tmp_path: Path) -> None:
    network, how = odd(depth=1), {"options": OPTIONS, "scores": tmp_path}
    whole = allocate_by_beam(network.model, [network.batch(8)], bits=9.0, options=OPTIONS)[1]

    def stop(what: str, done: int, total: int) -> None:
        if what == "dp-beam" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate_by_beam(network.model, [network.batch(8)], bits=9.0, progress=stop, **how)
    assert len(list(tmp_path.rglob("parts/choice*.json"))) == 3
    again = allocate_by_beam(network.model, [network.batch(8)], bits=9.0, **how)[1]
    assert again.units == whole.units and again.status == whole.status


def test_settings_that_make_no_sense_are_refused(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    with pytest.raises(InputError, match="no setting 'width'"):
        allocate_by_beam(network.model, [network.batch(4)], "dp-beam+width=3", bits=8.0, options=OPTIONS)
    with pytest.raises(InputError, match="at least 1"):
        allocate_by_beam(network.model, [network.batch(4)], "dp-beam+keep=0", bits=8.0, options=OPTIONS)
    with pytest.raises(InputError, match="cannot be met"):
        allocate_by_beam(network.model, [network.batch(4)], bits=1.0, options=OPTIONS)
