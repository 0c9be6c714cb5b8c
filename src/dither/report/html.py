"""The HTML report: one self-contained file, drawn from report data alone, that needs no network to be read."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dither.errors import StorageError
from dither.report import convnets, plots, table
from dither.report.comparison import layer_lines_plot, methods_plot, tradeoff_plot
from dither.report.data import (
    MethodSummary,
    best_cells,
    check_report,
    items,
    method_summaries,
    mixed_activations,
    number,
    section,
)

NUMERIC = frozenset(
    "Shape,Bits,Size,Output error,Time,Parameters,Modules,Top-1,Perplexity,Agreement,KL,SQNR dB,Seeds,Seed".split(",")
)
SORT_KEYS = {"Parameters": "parameters", "Bits": "bits_per_weight", "Output error": "output_error"}
ERRORS = "Output error: " + table.MEANING["Output error"] + "."
RANGES = (
    "Ranges: what a layer's input took on calibration data, against what its activation quantizer can represent; "
    "the rest is clipped."
)
OPERANDS = "Squared error of each quantized operand of the attention products over its squared norm."
METHODS = (
    "Small dots are seeds, bars ± one standard deviation around their mean. The dashed line is the full-precision "
    "model, where its top-1 is known."
)
TRADEOFF = "Higher and further left is better; bars are ± one standard deviation over seeds."

Draw = Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Cell:
    """One table cell: its text, the number it sorts by (None sorts as text), and how it is set."""

    text: str
    sort: float | None = None
    numeric: bool = False
    best: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawn plot with its heading and the line below it."""

    title: str
    caption: str
    svg: Markup


def render_html(data: Mapping[str, Any]) -> str:
    """The report as HTML text; equal data give equal text. Sections without data are left out."""
    check_report(data)
    if data["kind"] == "study":
        from dither.report.study import render_study  # it draws with the parts of this file

        return render_study(data)
    if data["kind"] == "tune":
        from dither.report.tune import render_tune

        return render_tune(data)
    if data["kind"] == "allocation":
        from dither.report.allocation import render_allocation

        return render_allocation(data)
    model = section(data, "model")
    template = environment().get_template("template.html")
    draw = _compare if data["kind"] == "compare" else _quantize
    provenance = {key: value for key, value in section(data, "provenance").items() if value is not None}
    failures = [
        {key.capitalize(): table.plain(value) for key, value in item.items()} for item in items(data, "failures")
    ]
    settings = (("Recipe", section(data, "recipe")), ("Provenance", provenance))
    return template.render(
        kind=data["kind"],
        name=table.plain(model.get("name") or "Model"),
        about=about(model),
        made_by=section(data, "provenance").get("dither"),
        summary=table.summary_rows(data),
        failures=_table(failures),
        settings=[(title, table.flat(values)) for title, values in settings if values],
        meaning=table.MEANING,
        **draw(data),
    )


def write_html(data: Mapping[str, Any], path: str | Path) -> Path:
    """Render `data` and write it to `path` in one step: a reader finds the old file or the whole new one.

    Raises: StorageError when the file cannot be written.
    """
    text, target = render_html(data), Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        temporary.chmod(0o644)  # mkstemp makes it private; a report is to be shared
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"expected to write the report to {str(target)!r}, got {error}; choose a writable path"
        ) from error
    return target


def about(model: Mapping[str, Any]) -> list[str]:
    """The line below a model's name: its class, size and source, as far as known."""
    known = [table.plain(model["class"])] if model.get("class") else []
    if number(model.get("parameters")) is not None:
        known.append(f"{table.count(model['parameters'])} parameters")
    if model.get("source") and model["source"] != model.get("name"):
        known.append(f"from {table.plain(model['source'])}")
    return known


def environment() -> Environment:
    """Where templates come from, and how they are filled."""
    return Environment(
        loader=PackageLoader("dither.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _quantize(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one quantized model."""
    layers, modules = items(data, "layers"), items(data, "coverage")
    ranges = any(layer.get("input_range") or layer.get("clip_range") for layer in layers)
    drawn = [
        ("Layers", f"{ERRORS} {RANGES}" if ranges else ERRORS, plots.layers_plot),
        ("Attention operands", OPERANDS, plots.operands_plot),
        ("Distilled pictures", convnets.PICTURES, convnets.pictures_figure),
        ("Distillation", convnets.LOSS, convnets.loss_plot),
        ("Pareto front", convnets.FRONT, convnets.front_plot),
        ("Pruned widths", convnets.WIDTHS, convnets.widths_plot),
        ("Stored bytes", table.MEANING["Size"].capitalize() + ".", plots.size_plot),
    ]
    coverage = _table(table.coverage_rows(data), modules)
    return {
        "comparison": [],
        "starts": (),
        "plots": _plots(data, drawn),
        "layers": _table(table.layer_rows(data), layers),
        "reasons": _table(table.coverage_reasons(data)),
        "coverage": coverage,
        "statuses": sorted({row["Status"].text for row in coverage}),
    }


def _compare(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of a comparison; `starts` are the rows where a new setting begins."""
    rows = method_summaries(data)
    drawn = [
        ("Quality and time", METHODS, methods_plot),
        ("Quality against bits", TRADEOFF, tradeoff_plot),
        ("Error per layer", table.MEANING["Output error"].capitalize() + "; mean over seeds.", layer_lines_plot),
    ]
    return {
        "warning": mixed_activations(data),
        "comparison": _compare_table(rows, set(table.compare_rows(data)[0]) if rows else set()),
        "starts": {i for i in range(1, len(rows)) if rows[i].setting != rows[i - 1].setting},
        "plots": _plots(data, drawn),
        "layers": [],
        "reasons": [],
        "coverage": [],
        "statuses": [],
    }


def _compare_table(rows: Sequence[MethodSummary], shown: Set[str]) -> list[dict[str, Cell]]:
    """The comparison's cells in the columns `shown`, the best of each setting marked."""
    best = best_cells(rows)
    compared = []
    for index, row in enumerate(rows):
        cells = {}
        for title, (metric, text) in table.compare_cells(row).items():
            value = row.metrics.get(metric)
            if title in shown:
                cells[title] = Cell(text, value.mean if value else None, title in NUMERIC, (index, metric) in best)
        compared.append(cells)
    return compared


def _plots(data: Mapping[str, Any], drawn: Sequence[tuple[str, str, Draw]]) -> list[Plot]:
    """The plots that have data. Their SVG is markup of matplotlib's, with all text escaped by it."""
    found = [(title, caption, draw(data)) for title, caption, draw in drawn]
    return [Plot(title, caption, Markup(svg)) for title, caption, svg in found if svg]


def _table(rows: Sequence[Mapping[str, str]], data: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Cell]]:
    """Cells of text rows; numbers that are shown with a unit sort by the values in `data`, row by row."""
    sources = data or [{}] * len(rows)
    return [
        {
            title: Cell(text, number(source.get(SORT_KEYS.get(title, ""))), title in NUMERIC)
            for title, text in row.items()
        }
        for row, source in zip(rows, sources, strict=True)
    ]
