"""Recipes: a method and its fields as YAML, read strictly and written fully resolved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dither.errors import InputError, PathError, nearest
from dither.methods import method_class, preset
from dither.methods.base import Method

SCHEMA = 1


def build_method(name: str, fields: Mapping[str, Any]) -> Method:
    """A method from its name and fields, texts allowed.

    Raises:
        InputError: unknown method or field (the nearest is named), or a value out of range.
    """
    kind = method_class(name)
    unknown = [key for key in fields if key not in kind.model_fields]
    if unknown:
        known = ", ".join(kind.model_fields)
        near = nearest(unknown[0], kind.model_fields)
        raise InputError(f"method {name!r} has no field {unknown[0]!r}{near} (fields: {known})")
    try:
        return kind(**{**preset(name)[1], **fields})
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"] if part in kind.model_fields or not _is_branch(part))
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "there is no such setting"
        raise InputError(f"method {name!r}, {where}: {message}; got {detail['input']!r}") from None


def _is_branch(part: str | int) -> bool:
    """Is part of a place pydantic's name of a union's branch, which no user wrote?"""
    return str(part).startswith(("constrained-", "function-")) or part in ("int", "float", "str", "bool")


def parse_method(text: str, fields: Mapping[str, Any]) -> Method:
    """A method from a text such as `gptq` or `gptq+reparameterize=true`; what the text says wins over `fields`."""
    name, *settings = text.strip().split("+")
    return build_method(name, {**fields, **dict(read_setting(setting) for setting in settings)})


def read_setting(text: str) -> tuple[str, Any]:
    """`field=value` with the value read as YAML, so that numbers, booleans, lists and `none` come out typed."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"expected FIELD=VALUE, got {text!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"{key.strip()}: {value!r} cannot be read as a value; quote it as YAML asks") from None
    return key.strip(), "none" if parsed is None else parsed


def resolved(method: Method) -> dict[str, Any]:
    """Every field of a method as plain data, with its name and the schema: enough to run it again."""
    return {"schema": SCHEMA, "method": method.name, **method.model_dump(mode="json")}


def to_yaml(method: Method) -> str:
    """The resolved recipe as text."""
    return yaml.safe_dump(resolved(method), sort_keys=False)


def from_data(data: Any, where: str, changes: Mapping[str, Any] | None = None) -> Method:
    """A method from recipe data; `changes` win over its fields.

    Raises:
        InputError: not a recipe of this schema, or `build_method`'s.
    """
    if not isinstance(data, Mapping) or "method" not in data:
        raise InputError(f"{where} is not a recipe: expected a mapping with schema and method")
    if data.get("schema") != SCHEMA:
        raise InputError(f"{where}: expected recipe schema {SCHEMA}, got {data.get('schema')}")
    fields = {str(key): value for key, value in data.items() if key not in ("schema", "method")}
    none = {key: "none" if value is None else value for key, value in fields.items()}
    return build_method(str(data["method"]), _joined(none, changes or {}))


def read_recipe(path: str | Path, changes: Mapping[str, Any] | None = None) -> Method:
    """A method from a YAML file; `changes` win over its fields.

    Raises:
        PathError: no such file.
        InputError: not YAML, or `from_data`'s.
    """
    file = Path(path)
    if not file.is_file():
        raise PathError(f"recipe {str(path)!r} does not exist")
    try:
        data = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {str(path)!r} is not YAML: {error}") from None
    return from_data(data, f"recipe {str(path)!r}", changes)


def _joined(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with changes: lists grow, the changes' patterns come first in mappings, all else is replaced."""
    joined = dict(fields)
    for key, value in changes.items():
        before = joined.get(key)
        if key == "skip" and isinstance(before, list | tuple):
            joined[key] = [*before, *value]
        elif key in ("overrides", "activation_overrides") and isinstance(before, Mapping):
            joined[key] = {**value, **{pattern: spec for pattern, spec in before.items() if pattern not in value}}
        else:
            joined[key] = value
    return joined
