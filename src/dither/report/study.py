"""The report of a study of generated text: tables and plots of formats against temperature, top-k and length."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from dither.report import canvas, table
from dither.report.data import items, number, section
from dither.report.html import Cell, Plot, about, environment

FULL = "full"
METRICS = {
    "perplexity": "perplexity",
    "agreement": "agreement, %",
    "repetition": "repetition, %",
    "distinct_2": "distinct pairs, %",
}
FACTOR = {"perplexity": 1.0, "agreement": 100.0, "repetition": 100.0, "distinct_2": 100.0}
COLUMNS = {
    "Format": "format", "Temperature": "temperature", "Top-k": "top_k", "New tokens": "new_tokens", "Texts": "texts",
    "Agreement": "agreement", "Same start": "common_start", "Perplexity": "perplexity", "Distinct 1": "distinct_1",
    "Distinct 2": "distinct_2", "Distinct 3": "distinct_3", "Repetition": "repetition",
}  # fmt: skip
SHARES = ("Agreement", "Distinct 1", "Distinct 2", "Distinct 3", "Repetition")
MEANING = (
    "Perplexity is that of the text under the full-precision model. Agreement: share of positions where the text has "
    "the full-precision model's token, drawn with the same noise. Same start: tokens before the first difference. "
    "Distinct: different runs of so many tokens over all runs. Repetition: share of runs of four that came before."
)


def study_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row of text for each format and setting."""
    return [{title: _text(title, row.get(key)) for title, key in COLUMNS.items()} for row in items(data, "rows")]


def _text(title: str, value: object) -> str:
    if title in SHARES:
        return table.percent(value)
    if title in ("Perplexity", "Same start"):
        return table.fixed(value, 1)
    if title == "Top-k":
        return "–" if value is None else str(value)
    return str(value)


def format_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row of text for each format: its bytes, speed and memory."""
    return [
        {
            "Format": str(one["format"]),
            "Bits": table.fixed(one.get("bits_per_weight")),
            "Size": table.size(one.get("size_bytes")),
            "Peak memory": table.size(one.get("peak_bytes")),
            "Tokens a second": table.fixed(one.get("tokens_per_s"), 1),
            "Prompt": table.seconds(one.get("prompt_s")),
        }
        for one in items(data, "formats")
    ]


def render_study(data: Mapping[str, Any]) -> str:
    """The report as HTML text."""
    rows, formats = study_rows(data), format_rows(data)
    prompts = [str(prompt) for prompt in data.get("prompts", ())]
    samples = [
        {
            "Format": str(one["format"]),
            "Temperature": str(one["temperature"]),
            "Prompt": prompts[int(one["prompt"])],
            "Text": str(one["text"]),
        }
        for one in items(data, "samples")
    ]
    tables = [
        (
            "Formats",
            "Speed and memory with codes as they are stored, while a short text is written.",
            "formats",
            formats,
        ),
        ("Results", f"Means over prompts and seeds. {MEANING} Click a heading to sort.", "results", rows),
        ("Texts", "What was written, with the first seed.", "texts", samples),
    ]
    settings = (("Settings", section(data, "settings")), ("Provenance", section(data, "provenance")))
    return environment().get_template("template.html").render(
        kind="study", name=table.plain(section(data, "model").get("name") or "Model"),
        about=about(section(data, "model")), made_by=section(data, "provenance").get("dither"), summary=[], failures=[],
        settings=[(title, table.flat(values)) for title, values in settings if values], meaning={}, comparison=[],
        starts=(), plots=_plots(data), layers=[], reasons=[], coverage=[], statuses=[],
        tables=[
            {"title": title, "caption": caption, "id": name, "rows": [_cells(row) for row in found]}
            for title, caption, name, found in tables if found
        ],
    )  # fmt: skip


def _cells(row: Mapping[str, str]) -> dict[str, Cell]:
    words = ("Format", "Prompt", "Text")
    return {title: Cell(text, None, title not in words or text[:1].isdigit()) for title, text in row.items()}


def _plots(data: Mapping[str, Any]) -> list[Plot]:
    """The metrics against each knob that has several values, the others at their largest."""
    rows, found = items(data, "rows"), []
    for knob, title in (("temperature", "temperature"), ("top_k", "top-k"), ("new_tokens", "new tokens")):
        chosen = _slice(rows, knob)
        if len({row[knob] for row in chosen}) > 1:
            held = ", ".join(f"{name} {value}" for name, value in _held(rows, knob).items())
            caption = f"Means over prompts and seeds at {held}."
            found.append(Plot(f"Against {title}", caption, Markup(_lines(chosen, knob, title))))
    return found


def _held(rows: Sequence[Mapping[str, Any]], knob: str) -> dict[str, Any]:
    """The values of the other knobs: the largest of each; 1 is hot enough to show a difference, and often tried."""
    others = [name for name in ("temperature", "top_k", "new_tokens") if name != knob]
    return {name: max((row[name] for row in rows if row[name] is not None), default=None) for name in others}


def _slice(rows: Sequence[Mapping[str, Any]], knob: str) -> list[Mapping[str, Any]]:
    held = _held(rows, knob)
    greedy = [row for row in rows if row["temperature"] == 0 and knob == "temperature"]
    chosen = [row for row in rows if all(row[name] == value for name, value in held.items())]
    return [row for row in greedy if row["new_tokens"] == held["new_tokens"]] + chosen


def _lines(rows: Sequence[Mapping[str, Any]], knob: str, title: str) -> str:
    formats = list(dict.fromkeys(str(row["format"]) for row in rows))
    with canvas.style(f"study-{knob}"):
        drawn = canvas.figure(3.3)
        axes = drawn.subplots(1, len(METRICS), squeeze=False)[0]
        canvas.place(drawn, 0.55, 0.15, 0.75, 0.5, space=0.5)
        for ax, (metric, label) in zip(axes, METRICS.items(), strict=True):
            _panel(ax, rows, formats, knob, metric)
            ax.set_title(label)
            ax.set_xlabel(title)
        handles = [canvas.mark(k, name) for k, name in enumerate(formats)]
        drawn.legend(handles=handles, loc="upper left", ncols=len(formats), frameon=False)
        return canvas.svg(drawn, f"Generated text against {title}", f"{len(formats)} formats: {', '.join(formats)}.")


def _panel(ax: Axes, rows: Sequence[Mapping[str, Any]], formats: Sequence[str], knob: str, metric: str) -> None:
    for index, name in enumerate(formats):
        points = sorted(
            (float(row[knob]), FACTOR[metric] * value)
            for row in rows
            if row["format"] == name and row[knob] is not None and (value := number(row.get(metric))) is not None
        )
        handle = canvas.mark(index, name)
        ax.plot(
            [x for x, _ in points], [y for _, y in points], color=handle.get_color(),
            linestyle=handle.get_linestyle(), marker=handle.get_marker(), markersize=3.5, linewidth=1.2,
        )  # fmt: skip
    if metric == "perplexity":
        ax.set_yscale("log")
    if knob == "top_k":
        ax.set_xscale("log")
    ax.grid()
