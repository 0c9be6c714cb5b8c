"""What methods there are and what their fields take, as plain data for people and programs."""

import re
import sys
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from dither.formats.spec import QuantSpec
from dither.methods import METHODS, method_class
from dither.methods.base import Method

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def catalog() -> list[dict[str, str]]:
    """Every method: name, summary, source."""
    return [{"name": name, "summary": _summary(kind), "source": _source(kind)} for name, kind in METHODS.items()]


def describe_method(name: str) -> dict[str, Any]:
    """A method's fields (name, type, default, description, whether all methods have it) and its module's docstring.

    Raises:
        InputError: there is no such method; the message names the nearest.
    """
    kind = method_class(name)
    defaults = kind().model_dump(mode="python")
    fields = [
        {
            "name": key,
            "type": type_text(info.annotation, info.metadata),
            "default": _text(getattr(kind(), key), defaults[key]),
            "description": info.description or "",
            "own": key not in Method.model_fields,
        }
        for key, info in kind.model_fields.items()
    ]
    doc = (sys.modules[kind.__module__].__doc__ or "").strip()
    return {
        "name": name,
        "summary": _summary(kind),
        "about": (kind.__doc__ or "").strip(),
        "doc": doc,
        "fields": fields,
    }


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A field's type in the words of the command line: `format or none`, `halves | columns`, `number > 0`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        text = " or ".join("none" if part is type(None) else type_text(part) for part in parts)
    elif origin is Literal:
        text = " | ".join(map(str, parts))
    elif origin is tuple:
        text = f"list of {type_text(parts[0])}s"
    elif origin is dict:
        text = "pattern: format, …"
    elif isinstance(annotation, type):
        words = {QuantSpec: "format", bool: "true | false", int: "whole number", float: "number", str: "pattern"}
        text = words.get(annotation, annotation.__name__)
    else:
        text = type_text(parts[0], parts[1:]) if parts else str(annotation)
    bounds = [
        f"{sign} {getattr(part, key)}" for part in metadata for key, sign in _BOUNDS.items() if hasattr(part, key)
    ]
    return f"{text} {' and '.join(bounds)}" if bounds else text


def _text(value: Any, dumped: Any) -> Any:
    """A default as it would be typed."""
    if isinstance(value, QuantSpec):
        return str(value)
    return "none" if value is None else list(dumped) if isinstance(dumped, tuple) else dumped


def _summary(kind: type[Method]) -> str:
    first = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]
    return first.partition(": ")[2] or first


def _source(kind: type[Method]) -> str:
    """The first sentence of the docstring's `Source:`."""
    lines = (sys.modules[kind.__module__].__doc__ or "").splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("Source:")), len(lines))
    stop = next((n for n in range(start, len(lines)) if not lines[n] or lines[n].startswith("Departs")), len(lines))
    text = " ".join(line.strip() for line in lines[start:stop]).removeprefix("Source:").strip()
    return re.split(r"(?<!\bal)\. ", text, maxsplit=1)[0].rstrip(".")
