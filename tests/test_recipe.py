"""Recipes: texts and YAML in, methods out; whatever is wrong is named."""

from pathlib import Path

import pytest

from dither.errors import InputError, PathError
from dither.methods import ERQ, GPTQ, PRESETS
from dither.recipe import build_method, from_data, parse_method, read_recipe, read_setting, to_yaml


def test_a_text_names_a_method_and_its_fields() -> None:
    method = parse_method("gptq+reparameterize=true+damping=0.05+activations=int4", {"weights": "int3", "damping": 0.5})
    assert isinstance(method, GPTQ)
    assert method.reparameterize
    assert method.damping == 0.05
    assert method.weights.bits == 3
    assert parse_method(" gptq ", {}) == GPTQ()
    assert parse_method("erq-v1+dual=true", {}) == ERQ(**{**PRESETS["erq-v1"][1], "dual": True})


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=0.5", 0.5), ("a=true", True), ("a=none", "none"), ("a=[x]", ["x"]), ("a=", "none")],
)  # fmt: skip
def test_settings_come_out_typed(text: str, value: object) -> None:
    assert read_setting(text) == ("a", value)


def test_a_setting_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="expected FIELD=VALUE, got 'damping'"):
        read_setting("damping")
    with pytest.raises(InputError, match="cannot be read as a value"):
        read_setting("a=[")


def test_a_value_out_of_range_is_refused_with_field_and_value() -> None:
    with pytest.raises(InputError, match=r"method 'gptq', damping: .*greater than 0; got -1"):
        build_method("gptq", {"damping": -1})
    with pytest.raises(InputError, match="unknown method 'erk'; did you mean 'erq'"):
        build_method("erk", {})


@pytest.mark.parametrize(("text", "message"), [
    ("baq+average=25", r"method 'baq', average: Input should be less than or equal to 8; got 25"),
    ("zeroq+distillation={stesp: 5}", r"method 'zeroq', distillation\.stesp: there is no such setting; got 5"),
])  # fmt: skip
def test_a_refused_value_is_told_in_the_user_s_words(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_method(text, {})


def test_changes_win_over_a_recipe_and_lists_grow() -> None:
    data = {"schema": 1, "method": "rtn", "weights": "int4", "skip": ["head"], "overrides": {"a": "int8", "b": "int2"}}
    method = from_data(data, "here", {"weights": "int3", "skip": ["stem"], "overrides": {"b": "int6"}})
    assert method.weights.bits == 3
    assert method.skip == ("head", "stem")
    assert [(key, spec.bits) for key, spec in method.overrides.items()] == [("b", 6), ("a", 8)]


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    with pytest.raises(PathError, match="does not exist"):
        read_recipe(file)
    for text, message in (
        ("[1", "is not YAML"),
        ("- 1", "expected a mapping with schema and method"),
        ("method: rtn", "expected recipe schema 1, got None"),
        ("schema: 1\nmethod: rtn\nbits: 4", "has no field 'bits'"),
        ("schema: 1\nmethod: !!python/object:os.system rtn", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_recipe(file)


def test_a_written_recipe_says_every_field() -> None:
    text = to_yaml(ERQ(weights="int3"))
    assert text.startswith("schema: 1\nmethod: erq\n")
    assert "lam_mean: 0.16" in text
