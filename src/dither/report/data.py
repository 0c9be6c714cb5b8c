"""Report data: the plain JSON of a run, checked once, with numbers made safe and runs summarised over seeds."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.errors import InputError, PathError, StorageError, nearest

SCHEMA = 1
LISTS = {
    "quantize": ("layers", "operands", "coverage"),
    "compare": ("runs", "failures"),
    "study": ("formats", "rows", "samples"),
    "tune": ("trials",),
    "allocation": ("units", "frontier", "uniform", "allocations"),
}
OBJECTS = {
    "quantize": ("model", "recipe", "provenance", "totals"),
    "compare": ("model", "provenance", "reference"),
    "study": ("model", "settings", "provenance"),
    "tune": ("model", "settings", "provenance", "reference", "best"),
    "allocation": ("model", "settings", "provenance"),
}
HIGHER_IS_BETTER = {"top1": True, "perplexity": False, "agreement": True, "kl": False, "sqnr_db": True}
SHOWN_DIGITS = {
    "top1": 3,
    "perplexity": 2,
    "agreement": 3,
    "kl": 3,
    "sqnr_db": 1,
}  # decimals that a reader of the table sees
METRICS = (*HIGHER_IS_BETTER, "bits_per_weight", "size_bytes", "time_s")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of `count` values; `std` is None for a single value."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class MethodSummary:
    """One row of a comparison: a label at one setting, over its seeds. `errors` is the mean output error per layer."""

    label: str
    weights: str
    activations: str
    setting: str
    runs: int
    metrics: Mapping[str, Spread | None]
    values: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, float]


def read_report(path: str | Path) -> dict[str, Any]:
    """Read and check a report file; a folder means the `report.json` in it.

    Raises: PathError when it is missing, StorageError when it is damaged, InputError when it is no report.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    if not file.is_file():
        raise PathError(
            f"expected a report file at {str(file)!r}, found none; give a report.json or the folder that holds it"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"expected JSON in {str(file)!r}, got {error}; write the report again") from error
    check_report(data)
    return dict(data)


def check_report(data: object) -> None:
    """Raise InputError unless `data` has the schema, kind and containers that the report draws from."""
    if not isinstance(data, Mapping):
        raise InputError(
            f"expected report data as a JSON object, got {type(data).__name__}; give a report.json of dither"
        )
    if data.get("schema") != SCHEMA:
        raise InputError(
            f"expected report schema {SCHEMA}, got {data.get('schema')!r}; write the report with this version of dither"
        )
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in LISTS:
        hint = nearest(str(kind), LISTS)
        raise InputError(f"expected report kind to be one of {sorted(LISTS)}, got {kind!r}{hint}")
    for key in OBJECTS[kind]:
        if not isinstance(data.get(key), Mapping | None):
            raise InputError(f"expected report field {key!r} to be an object, got {type(data[key]).__name__}")
    for key in LISTS[kind]:
        items = data.get(key)
        if not isinstance(items, list | tuple | None) or any(not isinstance(item, Mapping) for item in items or ()):
            raise InputError(f"expected report field {key!r} to be a list of objects; write the report again")


def section(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`, empty when absent."""
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def items(data: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    """The list of objects under `key`, empty when absent."""
    value = data.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def number(value: object) -> float | None:
    """A finite float, or None for everything a report cannot draw: null, NaN, Inf, text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def interval(value: object) -> tuple[float, float] | None:
    """A finite [low, high] pair, or None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def block(name: str) -> str:
    """The block that a layer belongs to: its name up to the first index, or empty outside of any block."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found.group(0) if found else ""


def role(name: str) -> str:
    """What a layer does in its block: the last part of its name that is not an index."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def setting(weights: str, activations: str) -> str:
    """The bit budget in the field's short form (`W3 A4`); rows of equal setting compete with each other."""
    return " ".join(f"{letter}{_bits(spec)}" for letter, spec in (("W", weights), ("A", activations)) if _bits(spec))


def _bits(spec: str) -> str:
    """The bits that end a format's name (`int4:g128`, `nf4`, `log2-4`), or its whole name when it does not end so."""
    head = spec.partition(":")[0]
    found = re.fullmatch(r"[a-z_]+(\d+)|.*-(\d+)", head)
    return (found.group(1) or found.group(2)) if found else head


def mixed_activations(data: Mapping[str, Any]) -> str:
    """A warning where some methods keep activations that others quantize, so that ranks say little; else empty."""
    kinds: dict[str, set[str]] = {}
    for run in items(data, "runs"):
        kinds.setdefault(str(run.get("label") or run.get("method") or ""), set()).add(_text(run.get("activations")))
    if len({frozenset(found) for found in kinds.values()}) < 2:
        return ""
    kept = [label for label, found in kinds.items() if found == {"none"}]
    others = [label for label in kinds if label not in kept]
    if not kept:
        return "The methods quantize activations in different formats: compare within a format only."
    return (
        f"{', '.join(kept)} quantize weights alone, {', '.join(others)} activations too: compare within a format only, "
        "or give all the same activations."
    )


def spread(values: Iterable[object]) -> Spread | None:
    """Mean and sample standard deviation of the finite numbers among `values`; None when there are none."""
    known = [value for value in map(number, values) if value is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Spread(mean, None, 1)
    return Spread(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)), len(known))


def quality_metric(data: Mapping[str, Any]) -> str:
    """What methods are ranked by: the first that any run knows of top-1, perplexity, agreement; else SQNR."""
    for metric in ("top1", "perplexity", "agreement"):
        if any(number(run.get(metric)) is not None for run in items(data, "runs")):
            return metric
    return "sqnr_db"


def method_summaries(data: Mapping[str, Any]) -> list[MethodSummary]:
    """Runs joined over their seeds: settings in the order given, the best method first within each."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in items(data, "runs"):
        key = (
            str(run.get("label") or run.get("method") or ""),
            _text(run.get("weights")),
            _text(run.get("activations")),
        )
        groups.setdefault(key, []).append(run)
    summaries = [_summary(*key, runs) for key, runs in groups.items()]
    order = list(dict.fromkeys(row.setting for row in summaries))
    metric = quality_metric(data)
    return sorted(summaries, key=lambda row: (order.index(row.setting), _rank(row, metric), row.label))


def best_cells(rows: Sequence[MethodSummary]) -> set[tuple[int, str]]:
    """(row, metric) of the best mean per setting, as far as the table shows it; nothing is best where all rows tie."""
    best: set[tuple[int, str]] = set()
    for name in dict.fromkeys(row.setting for row in rows):
        for metric, higher in HIGHER_IS_BETTER.items():
            means = {
                i: round(cell.mean, SHOWN_DIGITS[metric])
                for i, row in enumerate(rows)
                if row.setting == name and (cell := row.metrics[metric])
            }
            if len(set(means.values())) > 1:
                top = max(means.values()) if higher else min(means.values())
                best.update((i, metric) for i, mean in means.items() if mean == top)
    return best


def _summary(label: str, weights: str, activations: str, runs: Sequence[Mapping[str, Any]]) -> MethodSummary:
    errors: dict[str, list[object]] = {}
    for run in runs:
        for layer in items(run, "layers"):
            errors.setdefault(str(layer.get("name", "")), []).append(layer.get("output_error"))
    means = {name: found.mean for name, values in errors.items() if (found := spread(values))}
    return MethodSummary(
        label,
        weights,
        activations,
        setting(weights, activations),
        len(runs),
        {metric: spread(run.get(metric) for run in runs) for metric in METRICS},
        {metric: tuple(v for run in runs if (v := number(run.get(metric))) is not None) for metric in METRICS},
        means,
    )


def _rank(row: MethodSummary, metric: str) -> float:
    cell = row.metrics[metric]
    if cell is None:
        return math.inf
    return -cell.mean if HIGHER_IS_BETTER[metric] else cell.mean


def _text(value: object) -> str:
    return "" if value is None else str(value)
