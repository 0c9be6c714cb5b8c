"""Spaces hold what is allowed, and rows of numbers hold configurations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dither.errors import InputError
from dither.tuning.encoding import Encoder, joined
from dither.tuning.space import LARGEST, Dimension, Space


def test_a_space_is_a_nested_loop_without_what_is_not_allowed() -> None:
    dimensions = [Dimension("a", (1, 2)), Dimension("b", ("x", "y"))]
    assert Space.of(dimensions).points == ((1, "x"), (1, "y"), (2, "x"), (2, "y"))
    space = Space.of(dimensions, lambda c: (c["a"], c["b"]) != (1, "y"))
    assert space.points == ((1, "x"), (2, "x"), (2, "y"))
    assert space.configuration((2, "x")) == {"a": 2, "b": "x"}
    assert space.point({"b": "x", "a": 2}) == (2, "x")
    with pytest.raises(InputError, match="not in the space"):
        space.point({"a": 1, "b": "y"})
    with pytest.raises(InputError, match="expected values of a, b, got a"):
        space.point({"a": 1})


def test_a_space_of_nothing_of_too_much_or_with_a_value_twice_is_refused() -> None:
    with pytest.raises(InputError, match="no configuration"):
        Space.of([Dimension("a", (1,))], lambda _: False)
    with pytest.raises(InputError, match="more than 50,000"):
        Space.of([Dimension(name, tuple(range(1, 100))) for name in "abc"])
    assert LARGEST < 99**3
    with pytest.raises(InputError, match="names a value twice"):
        Dimension("a", ("x", "x"))
    with pytest.raises(InputError, match="has no value"):
        Dimension("a", ())


def test_encoding_and_decoding_a_configuration_gives_it_back(space: Space) -> None:
    encoder = Encoder(space.dimensions, ("depth",))
    rows = [encoder.encode(space.configuration(point), {"depth": 3.0}) for point in space.points]
    assert [encoder.decode(row) for row in rows] == [space.configuration(point) for point in space.points]
    assert len({tuple(row) for row in rows}) == len(space)
    assert {row[-1] for row in rows} == {3.0}
    assert math.isnan(encoder.encode(space.configuration(space.points[0]))[-1])


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=6, unique=True), st.data())
def test_numbers_come_back_from_their_logarithms(values: list[int], data: st.DataObject) -> None:
    encoder = Encoder((Dimension("n", tuple(values)), Dimension("s", ("a", "b", "c"))))
    wanted = {"n": data.draw(st.sampled_from(values)), "s": data.draw(st.sampled_from("abc"))}
    assert encoder.decode(encoder.encode(wanted)) == wanted


def test_values_of_another_run_get_columns_of_their_own(space: Space) -> None:
    other = {"samples": 500, "scheme": "log", "clip": "no", "grain": "tensor", "ends": "kept"}
    dimensions = joined(space.dimensions, [other])
    encoder = Encoder(dimensions)
    assert len(encoder.encode(other)) == len(Encoder(space.dimensions).encode(space.configuration(space.points[0]))) + 1
    assert encoder.decode(encoder.encode(other)) == other
    assert not encoder.knows({"scheme": "log"})
