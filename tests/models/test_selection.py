"""Layers chosen by name or pattern."""

import pytest

from dither.errors import InputError
from dither.models.anatomy import Anatomy, Unit
from dither.models.selection import matching, without

ANATOMY = Anatomy(
    (
        Unit("stem", False, ("stem",), ()),
        Unit("blocks.0", True, ("blocks.0.q", "blocks.0.fc"), ("blocks.0",)),
        Unit("head", False, ("head",), ()),
    ),
    "stem",
    {"lost": "never called in the forward pass"},
)


def test_names_and_patterns_choose_layers() -> None:
    assert matching("blocks.0.q", ANATOMY.layers) == ["blocks.0.q"]
    assert matching("blocks.*", ANATOMY.layers) == ["blocks.0.q", "blocks.0.fc"]
    assert matching("*", ANATOMY.layers) == list(ANATOMY.layers)


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"pattern 'blocks\.0\.fcc' matches no layer; did you mean 'blocks\.0\.fc'\?"):
        matching("blocks.0.fcc", ANATOMY.layers)
    with pytest.raises(InputError, match="matches no layer"):
        without(ANATOMY, ["lost"])


def test_layers_left_out_are_kept_with_the_pattern_as_reason() -> None:
    left = without(ANATOMY, ["*.q", "head"])
    assert [unit.layers for unit in left.units] == [("stem",), ("blocks.0.fc",)]
    assert left.kept == {
        "lost": "never called in the forward pass",
        "blocks.0.q": "skipped by '*.q'",
        "head": "skipped by 'head'",
    }


def test_two_patterns_may_choose_the_same_layer() -> None:
    assert without(ANATOMY, ["*.q", "blocks.0.q"]).kept["blocks.0.q"] == "skipped by 'blocks.0.q'"
