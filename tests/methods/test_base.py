"""The base of every method: formats that follow each other, formats of single layers."""

import pytest
from pydantic import ValidationError

from dither.errors import InputError
from dither.formats.spec import QuantSpec
from dither.methods import METHODS, RTN, Method, method_class
from dither.walk import Block


def test_attention_follows_the_bits_of_activations_where_it_is_not_given() -> None:
    method = RTN(activations="int5:token")
    assert str(method.attention) == str(method.activations)
    assert method.probabilities is not None
    assert (method.probabilities.kind, method.probabilities.bits) == ("logsqrt2", 5)
    assert RTN().attention is RTN().probabilities is RTN().activations is None
    given = RTN(activations="int4", attention="int8", probabilities="none")
    assert given.attention is not None
    assert given.attention.bits == 8
    assert given.probabilities is None


def test_the_first_override_that_matches_wins() -> None:
    method = RTN(weights="int4", overrides={"a.b": "int2", "a.*": "int8"})
    assert [method.weight_spec(name).bits for name in ("a.b", "a.c", "b")] == [2, 8, 4]


def test_what_a_short_text_leaves_out_comes_from_the_methods_own_format() -> None:
    assert RTN(weights="int3:sym").weights.search == "percentile"
    assert RTN(weights=QuantSpec(bits=3)).weights == QuantSpec(bits=3)


def test_wrong_values_are_refused_when_the_method_is_made() -> None:
    with pytest.raises(ValidationError, match="bits must be 1 to 8"):
        RTN(weights="int9")
    with pytest.raises(ValidationError, match="Extra inputs"):
        RTN(weigths="int4")  # type: ignore[call-arg]


def test_a_method_without_run_says_so() -> None:
    class Empty(Method):
        name = "empty"

    blocks: list[Block] = []
    from dither.engine.local import InProcess

    with pytest.raises(TypeError, match="Empty does not define run"):
        Empty().run(blocks, InProcess())


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"unknown method 'gtpq'; did you mean 'gptq'\? \(known: rtn, "):
        method_class("gtpq")
    assert all(method_class(name) is kind and kind.name == name for name, kind in METHODS.items())
