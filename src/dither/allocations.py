"""Allocations as files, and as the recipe of a method; what became of the bits that one promised."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from dither.allocation.allocation import Allocation
from dither.errors import InputError, PathError
from dither.formats.layout import Layout
from dither.methods.base import Method
from dither.storage import write_text


def write_allocation(allocation: Allocation, path: str | Path) -> None:
    """As YAML, which `read_allocation` and `dither quantize --allocation` read."""
    text = yaml.safe_dump(allocation.to_data(), sort_keys=False, allow_unicode=True, width=120)
    write_text(text, Path(path))


def read_allocation(path: str | Path) -> Allocation:
    """What `dither allocate` wrote, YAML or JSON.

    Raises:
        PathError: there is no such file.
        InputError: it is no allocation.
    """
    file = Path(path)
    if not file.is_file():
        raise PathError(f"allocation {str(path)!r} does not exist")
    try:
        data = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"allocation {str(path)!r} is not YAML: {error}") from None
    return Allocation.from_data(data, f"allocation {str(path)!r}")


def allocated(method: Method, allocation: Allocation) -> Method:
    """The method with each layer's formats as the allocation says; overrides and skips it has already win.

    Raises:
        InputError: a format that the method cannot store.
    """
    given = {name: getattr(method, name) for name in type(method).model_fields}
    ours = {name for name in allocation.layers if not any(fnmatchcase(name, one) for one in method.overrides)}
    weights = {n: one.weights for n, one in allocation.layers.items() if one.weights is not None and n in ours}
    for name, spec in weights.items():
        if spec.kind not in method.kinds:
            raise InputError(f"{name} is to be {spec}, but {method.name} stores one of {', '.join(method.kinds)}")
    inputs = {n: one.activations for n, one in allocation.layers.items() if one.activations is not None}
    given["overrides"] = {**method.overrides, **weights}
    given["activation_overrides"] = {**method.activation_overrides, **inputs}
    given["skip"] = tuple(dict.fromkeys([*method.skip, *(name for name in allocation.kept() if name in ours)]))
    return type(method)(**given)


def kept_promise(allocation: Allocation, layers: Sequence[Mapping[str, Any]], model_sha256: str) -> dict[str, Any]:
    """What an allocation promised and what came of it, from the layers of a report.

    What a method stores beside codes and scales (outliers, corrections) was not promised, and makes the difference.
    """
    mine, promised = [row for row in layers if row["name"] in allocation.layers], 0
    for row in mine:
        spec, (rows, columns) = allocation.layers[row["name"]].weights, row["shape"]
        promised += 0 if spec is None else 8 * Layout(spec, (rows, columns)).nbytes
    weights = sum(row["shape"][0] * row["shape"][1] for row in mine)
    stored = 8 * sum(row["nbytes"] for row in mine)
    return {
        "by": allocation.facts.get("sensitivity"),
        "solver": allocation.solver,
        "status": allocation.status,
        "gap": allocation.gap,
        "average_bits": allocation.bits,  # full-precision layers included
        "promised_bits": promised / weights if weights else 0.0,
        "achieved_bits": stored / weights if weights else 0.0,
        "as_promised": stored == promised and set(allocation.overrides()) == {row["name"] for row in mine},
        "same_model": allocation.facts.get("model_sha256") in (None, model_sha256),
    }
