"""What a search may choose for a model: all that fits, once each."""

from collections.abc import Callable
from typing import Any

import pytest

from dither.errors import InputError
from dither.models.anatomy import read_anatomy
from dither.quantune.choices import Choices, dimensions_of


@pytest.fixture
def choices(tiny: Callable[..., Any]) -> Choices:
    network = tiny()
    return Choices(network.model, read_anatomy(network.model, lambda: network.logits(network.batch(1))))


def only(**values: Any) -> list[Any]:
    """Dimensions with one value each, but for those given."""
    free = {"scheme": ["asym"], "search": ["minmax"], "granularity": ["channel"], "ends": ["quantized"], "samples": [4]}
    names = ("methods", "weights", "activations")
    first = [values.pop(name, default) for name, default in zip(names, (["rtn"], ["int4"], ["none"]), strict=True)]
    return dimensions_of(*first, {**free, **values}, [4])


def test_a_configuration_becomes_the_fields_of_a_method(choices: Choices) -> None:
    method = choices.method({
        "method": "gptq+damping=0.1", "weights": "int3", "activations": "int8", "scheme": "pow2", "search": "mse",
        "granularity": "g8", "ends": "kept", "samples": 4,
    })  # fmt: skip
    assert (method.name, method.damping) == ("gptq", 0.1)  # type: ignore[attr-defined]
    assert str(method.weights) == "int3:g8:mse:pow2"
    assert str(method.activations) == "int8:tensor:mse:pow2"
    assert set(method.skip) == set(choices.ends())
    assert choices.ends() == ["vit.embeddings.patch_embeddings.projection", "classifier"]
    eight = choices.method({"method": "rtn", "weights": "int2", "activations": "none", "ends": "int8"})
    assert eight.weight_spec("classifier").bits == 8
    assert eight.weight_spec("vit.layers.0.attention.q_proj").bits == 2


def test_a_format_says_more_than_the_dimensions(choices: Choices) -> None:
    space = choices.space(only(weights=["int4:sym"], scheme=["asym", "sym", "pow2"]))
    assert {choices.method(space.configuration(p)).weights.symmetry for p in space.points} == {"sym"}
    assert len(space) == 2  # asym and sym mean the same here
    assert any("1 combinations mean the same" in note for note in choices.notes)


def test_methods_and_groups_that_do_not_fit_are_left_out_with_a_reason(choices: Choices) -> None:
    space = choices.space(only(methods=["rtn", "squeezellm"], granularity=["channel", "g7", "g16"]))
    assert {(p[0], p[5]) for p in space.points} == {("rtn", "channel"), ("rtn", "g16")}
    notes = " ".join(choices.notes)
    assert "squeezellm is left out" in notes
    assert "group size 7" in notes


def test_what_is_over_a_limit_of_size_by_its_formats_is_not_tried(choices: Choices) -> None:
    dimensions = only(weights=["int2", "int4", "int8"])
    sizes = {b: choices.least_bytes(choices.method({**PLAIN, "weights": f"int{b}"})) for b in (2, 4, 8)}
    assert sizes[2] < sizes[4] < sizes[8]
    space = choices.space(dimensions, float(sizes[4]))
    assert {p[1] for p in space.points} == {"int2", "int4"}
    assert any("1 combinations are over the limit" in note for note in choices.notes)
    with pytest.raises(InputError, match=f"the smallest takes {sizes[2]} bytes"):
        choices.space(dimensions, float(sizes[2] - 1))


PLAIN = {"method": "rtn", "activations": "none", "granularity": "channel", "ends": "quantized"}


def test_the_least_size_is_what_is_stored(choices: Choices, tiny: Callable[..., Any]) -> None:
    import dither

    method = choices.method({**PLAIN, "weights": "int4"})
    network = tiny()
    result = dither.quantize(network.model, method, network.batch(4))
    assert result.report.data["totals"]["size_bytes"] == choices.least_bytes(method)


@pytest.mark.parametrize(("values", "message"), [
    ({"sheme": ["asym"]}, "did you mean 'scheme'"),
    ({"scheme": ["symmetric"]}, "scheme: expected asym, sym, pow2"),
    ({"search": ["kl"]}, "search: expected minmax"),
    ({"samples": [0]}, "samples: expected whole numbers"),
    ({"granularity": []}, "has no value"),
])  # fmt: skip
def test_dimensions_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        only(**values)


@pytest.mark.parametrize(("values", "message"), [
    ({"methods": ["gtpq"]}, "did you mean 'gptq'"),
    ({"methods": ["rtn", "gtpq+damping=0.1"]}, "did you mean 'gptq'"),
    ({"weights": ["nuq3"]}, "no method takes these formats"),
    ({"granularity": ["g7"]}, "group size 7"),
    ({"ends": ["int9"]}, "bits must be 1 to 8"),
])  # fmt: skip
def test_a_space_that_nothing_is_left_of_says_why(choices: Choices, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choices.space(only(**values))
