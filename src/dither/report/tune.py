"""The report of a search: trials over time, quality against size, and what each choice did on average."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from dither.report import canvas, table
from dither.report.canvas import INK, MUTED, PALETTE
from dither.report.data import items, number, section
from dither.report.html import Cell, Plot, about, environment

FIGURES = {"accuracy": "top1", "perplexity": "perplexity", "kl": "kl", "size": "size_bytes"}
WORDS = {"accuracy": "top-1, %", "perplexity": "perplexity", "kl": "KL, nats", "size": "size, MB"}
SCALE = {"accuracy": 100.0, "perplexity": 1.0, "kl": 1.0, "size": 1e-6}
QUALITIES = ("accuracy", "perplexity", "kl")
TEXTS = ("Method", "Remark", "Note", "Value", "Dimension")
UP = ("accuracy",)  # higher is better
SPREAD = 30.0  # largest over smallest from which an axis is logarithmic


def render_tune(data: Mapping[str, Any]) -> str:
    """The report as HTML text."""
    settings = {key: value for key, value in section(data, "settings").items() if key != "limits"}
    limits = {one["name"]: limit_text(one) for one in items(section(data, "settings"), "limits")}
    groups = (("Search", settings | {"limits": limits}), ("Provenance", section(data, "provenance")))
    tables = [
        ("Trials", "In the order of the search. Click a heading to sort.", "trials", trial_rows(data, ranked=False)),
        ("What each choice did", "Mean over the trials that had it; trials chose for themselves, so a choice that was "
         "dropped early is seen beside bad company only.", "effects", effect_rows(data)),
        ("Notes", "What was left out, split or learned from.", "notes", [{"Note": x} for x in data.get("notes", ())]),
    ]  # fmt: skip
    return environment().get_template("template.html").render(
        kind="tune", name=table.plain(section(data, "model").get("name") or "Model"),
        about=about(section(data, "model")), made_by=section(data, "provenance").get("dither"), summary=summary(data),
        failures=[], settings=[(title, table.flat(values)) for title, values in groups if values], meaning={},
        comparison=[], starts=(), plots=_plots(data), layers=[], reasons=[], coverage=[], statuses=[],
        tables=[
            {"title": title, "caption": caption, "id": name, "rows": [_cells(row) for row in rows]}
            for title, caption, name, rows in tables if rows
        ],
    )  # fmt: skip


def limit_text(limit: Mapping[str, Any]) -> str:
    """A limit as a person would say it."""
    name, bound = str(limit["name"]), float(limit["bound"])
    return f"{'at least' if name in UP else 'at most'} {figure_text(name, bound)}"


def figure_text(name: str, value: object) -> str:
    """A figure of a trial with its unit."""
    if name == "size":
        return table.size(value)
    return table.percent(value) if name == "accuracy" else table.significant(value, 4)


def objective(data: Mapping[str, Any]) -> str:
    """The name of what was to be improved."""
    return str(section(data, "settings")["objective"])


def shown(data: Mapping[str, Any]) -> list[str]:
    """The figures that trials have: the objective's first, then the other qualities, then size."""
    aim, trials = objective(data), items(data, "trials")
    have = [n for n in QUALITIES if any(number(section(t, "figures").get(FIGURES[n])) is not None for t in trials)]
    return list(dict.fromkeys([aim, *have, "size"]))


def trial_rows(data: Mapping[str, Any], ranked: bool) -> list[dict[str, str]]:
    """A row of text for each trial, best first if `ranked`."""
    trials = items(data, "trials")
    names = shown(data)
    dimensions = _varied(trials)
    if ranked:
        trials = sorted(
            trials, key=lambda one: (bool(one.get("error")), one.get("violation", 0), _cost(one), one.get("tie", 0))
        )
    rows = []
    for one in trials:
        row = {"Trial": str(one["number"])}
        row |= {name.capitalize(): str(section(one, "configuration").get(name)) for name in dimensions}
        row |= {name.capitalize(): figure_text(name, section(one, "figures").get(FIGURES[name])) for name in names}
        rows.append(row | {"Time": table.seconds(one.get("time_s")), "Remark": _remark(one)})
    return rows if any(row["Remark"] for row in rows) else [
        {key: text for key, text in row.items() if key != "Remark"} for row in rows
    ]  # fmt: skip


def effect_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each value of each dimension: how often it was tried, and the mean and best of the objective."""
    trials, aim = items(data, "trials"), objective(data)
    rows = []
    for name in _varied(trials):
        values = list(dict.fromkeys(section(one, "configuration").get(name) for one in trials))
        for value in sorted(values, key=str):
            same = [one for one in trials if section(one, "configuration").get(name) == value]
            known = [x for one in same if (x := number(section(one, "figures").get(FIGURES[aim]))) is not None]
            best = (max if aim in UP else min)(known, default=None)
            rows.append({
                "Dimension": name, "Value": str(value), "Trials": str(len(same)),
                "Mean": figure_text(aim, fmean(known) if known else None), "Best": figure_text(aim, best),
            })  # fmt: skip
    return rows


def summary(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The large figures on top of the page."""
    best, reference, aim = section(data, "best"), section(data, "reference"), objective(data)
    trials = items(data, "trials")
    failed = sum(bool(one.get("error")) for one in trials)
    note = f"{failed} failed" if failed else ""
    count = {
        "figure": "Trials",
        "value": str(len(trials)),
        "note": note,
        "meaning": "configurations that were measured",
    }
    if not best:
        return [count]
    method = str(section(best, "configuration").get("method"))
    meaning = "method of the best trial that kept the limits"
    rows = [{"figure": "Best", "value": method, "note": f"trial {best['number']}", "meaning": meaning}]
    for name in shown(data):
        key = FIGURES[name]
        full = reference.get(key) if name != "kl" else None
        rows.append({
            "figure": name.capitalize(), "value": figure_text(name, section(best, "figures").get(key)),
            "note": "" if full is None else f"{figure_text(name, full)} in full precision",
            "meaning": "what the search improved" if name == aim else "",
        })  # fmt: skip
    test = section(best, "test")
    for name in QUALITIES:
        if number(test.get(FIGURES[name])) is not None:
            value, note = figure_text(name, test[FIGURES[name]]), str(test.get("source"))
            rows.append(
                {"figure": f"Test {name}", "value": value, "note": note, "meaning": "on data that chose nothing"}
            )
    return [*rows, count]


def _varied(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for one in trials for name in section(one, "configuration")))
    return [
        name
        for name in names
        if len({str(section(one, "configuration").get(name)) for one in trials}) > 1 or name == "method"
    ]


def _cost(trial: Mapping[str, Any]) -> float:
    cost = number(trial.get("cost"))
    return float("inf") if cost is None else cost


def _remark(trial: Mapping[str, Any]) -> str:
    if trial.get("error"):
        return f"failed: {trial['error']}"
    violation = number(trial.get("violation"))
    return (
        "" if violation == 0 else "over the limit" if violation is None else f"{100 * violation:.1f}% over the limits"
    )


def _cells(row: Mapping[str, str]) -> dict[str, Cell]:
    return {title: Cell(text, None, title not in TEXTS and text[:1].isdigit()) for title, text in row.items()}


def _plots(data: Mapping[str, Any]) -> list[Plot]:
    """Over time, and quality against size."""
    aim, names = objective(data), shown(data)
    quality = aim if aim != "size" else next((name for name in names if name != "size"), None)
    caption = "Each dot is a trial, grey where it broke a limit; the line is the best so far. Dashed: full precision."
    found = [("Over time", caption, _over_time(data, aim))]
    if quality is not None:
        caption = "Each dot is a trial; the line joins those that no other beats in both. The star is the best."
        found.append(("Quality against size", caption, _pareto(data, quality)))
    return [Plot(title, caption, Markup(text)) for title, caption, text in found if text]


def _over_time(data: Mapping[str, Any], aim: str) -> str | None:
    points = [
        (int(one["number"]), SCALE[aim] * value, number(one.get("violation")) == 0)
        for one in items(data, "trials")
        if (value := number(section(one, "figures").get(FIGURES[aim]))) is not None
    ]
    if not points:
        return None
    with canvas.style("tune-time"):
        drawn = canvas.figure(3.2)
        ax = drawn.subplots()
        canvas.place(drawn, 0.75, 0.15, 0.2, 0.5)
        _scaled(ax, "y", [y for _, y, _ in points])
        for kept, shade in ((True, PALETTE[0]), (False, MUTED)):
            some = [(x, y) for x, y, k in points if k == kept]
            ax.scatter([x for x, _ in some], [y for _, y in some], s=16, color=shade, alpha=0.7, linewidths=0)
        line = _running(points, aim in UP)
        ax.step([x for x, _ in line], [y for _, y in line], where="post", color=INK, linewidth=1.2)
        _reference(ax, data, aim)
        ax.set_xlabel("trial")
        ax.set_ylabel(WORDS[aim])
        ax.grid(visible=True)
        return canvas.svg(drawn, "Trials over time", f"{len(points)} trials, {WORDS[aim]}.")


def _running(points: Sequence[tuple[int, float, bool]], up: bool) -> list[tuple[int, float]]:
    """The best so far after each trial."""
    line: list[tuple[int, float]] = []
    for x, y, kept in sorted(points):
        if kept and (not line or (y > line[-1][1] if up else y < line[-1][1])):
            line.append((x, y))
        elif line:
            line.append((x, line[-1][1]))
    return line


def _pareto(data: Mapping[str, Any], quality: str) -> str | None:
    points = [
        (size * SCALE["size"], SCALE[quality] * value, int(one["number"]))
        for one in items(data, "trials")
        if (value := number(section(one, "figures").get(FIGURES[quality]))) is not None
        and (size := number(section(one, "figures").get("size_bytes"))) is not None
    ]
    if not points:
        return None
    with canvas.style("tune-pareto"):
        drawn = canvas.figure(3.6)
        ax = drawn.subplots()
        canvas.place(drawn, 0.75, 0.15, 0.2, 0.5)
        _scaled(ax, "y", [y for _, y, _ in points])
        ax.scatter(
            [x for x, _, _ in points], [y for _, y, _ in points], s=16, color=PALETTE[0], alpha=0.7, linewidths=0
        )
        line = pareto([(x, y) for x, y, _ in points], quality in UP)
        ax.step([x for x, _ in line], [y for _, y in line], where="post", color=PALETTE[1], linewidth=1.2)
        chosen = section(data, "best").get("number")
        star = [(x, y) for x, y, n in points if n == chosen]
        ax.scatter([x for x, _ in star], [y for _, y in star], s=90, marker="*", color=INK, zorder=3)
        _reference(ax, data, quality)
        ax.set_xlabel(WORDS["size"])
        ax.set_ylabel(WORDS[quality])
        ax.grid(visible=True)
        return canvas.svg(drawn, "Quality against size", f"{len(points)} trials, {len(line)} of them not beaten.")


def pareto(points: Sequence[tuple[float, float]], up: bool) -> list[tuple[float, float]]:
    """The (size, quality) pairs that no other is at least as good as in both, by size."""
    line: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if up else p[1])):
        if not line or (y > line[-1][1] if up else y < line[-1][1]):
            line.append((x, y))
    return line


def _scaled(ax: Axes, axis: str, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > SPREAD * min(values):
        canvas.log_axis(ax, axis, values)


def _reference(ax: Axes, data: Mapping[str, Any], name: str) -> None:
    value = number(section(data, "reference").get(FIGURES[name])) if name in ("accuracy", "perplexity") else None
    if value is not None:
        ax.axhline(SCALE[name] * value, color=INK, linewidth=0.9, linestyle="--")
