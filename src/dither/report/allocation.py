"""The report of score tables and allocations: which units hurt, how sure that is, and what the budget buys."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from dither.allocation.allocation import Allocation
from dither.allocation.lagrangian import hull
from dither.allocation.problem import Problem
from dither.allocation.table import SIZE, ScoreTable
from dither.report import canvas, table
from dither.report.data import SCHEMA, items, number, section
from dither.report.html import Cell, Plot, about, environment

_SETTINGS = ("sensitivity", "settings", "method", "options", "time_s", "draws", "negative")
_PROVENANCE = ("dither", "torch", "transformers", "python", "device", "seed", "model_sha256", "calibration")
_ROUNDING = 1e-9  # of a gap, relative to the score
UNITS = "Score of each unit as each format, lower is better; bars are standard errors where they are known."
FRONTIER = (
    "Total score against stored bits a weight. The line is the lower convex hull of all allocations; none lies below. "
    "Crosses have one format everywhere."
)


def allocation_report(scores: ScoreTable, allocations: Sequence[Allocation] = ()) -> dict[str, Any]:
    """Report data of kind `allocation`."""
    texts = [str(option) for option in scores.options]
    facts = scores.facts
    return {
        "schema": SCHEMA,
        "kind": "allocation",
        "model": {"name": facts.get("model"), "parameters": scores.parameters},
        "settings": {key: facts[key] for key in _SETTINGS if key in facts} | {"weights": scored_weights(facts)},
        "provenance": {key: facts[key] for key in _PROVENANCE if key in facts},
        "options": texts,
        "units": [
            {
                "name": unit.name,
                "layers": list(unit.layers),
                "parameters": unit.parameters,
                "scores": [_plain(x) for x in scores.scores[row]],
                "errors": None if scores.errors is None else [_plain(x) for x in scores.errors[row]],
                "priority": None if scores.priority is None else float(scores.priority[row]),
                "chosen": [str(one.units[unit.name]) for one in allocations],
            }
            for row, unit in enumerate(scores.units)
        ],
        "frontier": frontier_rows(scores),
        "uniform": uniform_rows(scores),
        "allocations": [_summary(one) for one in allocations],
    }


def scored_weights(facts: Mapping[str, Any]) -> str:
    """Whose weights a table's scores are of."""
    return f"solved by {facts['method']}" if "solver" in facts else "nearest codes"


def frontier_rows(scores: ScoreTable) -> list[dict[str, float]]:
    """Corners of the hull of average bits against score."""
    corners = hull(Problem(scores.scores, scores.costs, {SIZE: math.inf}))
    return [{"bits": cost / scores.parameters, "score": score} for cost, score, _ in corners]


def uniform_rows(scores: ScoreTable) -> list[dict[str, Any]]:
    """Average bits and score where all units have one option, for the options that all can have."""
    able = np.isfinite(scores.scores).all(axis=0)
    return [
        {
            "option": str(option),
            "bits": float(scores.costs[SIZE][:, p].sum()) / scores.parameters,
            "score": float(scores.scores[:, p].sum()),
        }
        for p, option in enumerate(scores.options)
        if able[p]
    ]


def allocation_rows(allocations: Sequence[Allocation]) -> list[dict[str, str]]:
    """A row of text for each allocation."""
    return [
        {
            "Asked for": _asked(one),
            "Bits": table.fixed(one.bits, 4),
            "Size": f"{table.size(one.size_bytes)}, {one.fixed_share:.0%} fixed",
            "Score": table.significant(one.score),
            "Solver": f"{one.solver}: {one.status}",
            "Gap": _gap(one.gap),
        }
        for one in allocations
    ]


def option_rows(scores: ScoreTable, allocation: Allocation) -> list[dict[str, str]]:
    """A row of text for each unit, in execution order: its formats, and what an error costs there."""
    places = {str(option): p for p, option in enumerate(scores.options)}
    rows = []
    for row, unit in enumerate(scores.units):
        chosen = str(allocation.units[unit.name])
        error = None if scores.errors is None else scores.errors[row, places[chosen]]
        rows.append(
            {
                "Unit": unit.name,
                "Weights": table.count(unit.parameters),
                "Format": chosen,
                "Bits": table.fixed(scores.costs[SIZE][row, places[chosen]] / unit.parameters),
                "Score": table.significant(float(scores.scores[row, places[chosen]])),
                "± ": "–" if error is None else table.significant(float(error)),
            }
        )
    return rows


def score_rows(scores: ScoreTable) -> list[dict[str, str]]:
    """A row of text for each unit, the worst first: its score as each format and how sure the worst is."""
    finite = np.where(np.isfinite(scores.scores), scores.scores, -np.inf)
    order = sorted(range(len(scores.units)), key=lambda row: -float(finite[row].max()))
    rows = []
    for row in order:
        worst = int(finite[row].argmax())
        error = None if scores.errors is None else float(scores.errors[row, worst])
        share = None if error is None or not finite[row, worst] else 100 * error / float(finite[row, worst])
        values = {
            text: table.significant(_plain(scores.scores[row, p])) for p, text in enumerate(shortened(scores.options))
        }
        unit = {"Unit": scores.units[row].name, "Weights": table.count(scores.units[row].parameters)}
        rows.append({**unit, **values, "± %": "–" if share is None or math.isnan(share) else f"{share:.0f}"})
    return rows


def shortened(options: Sequence[object]) -> list[str]:
    """Formats without the tokens that all end in: `int4`, `int8` for `int4:tensor:asym`, `int8:tensor:asym`."""
    parts = [str(option).split(":") for option in options]
    while len(parts) > 1 and all(len(part) > 1 and part[-1] == parts[0][-1] for part in parts):
        parts = [part[:-1] for part in parts]
    return [":".join(part) for part in parts]


def render_allocation(data: Mapping[str, Any]) -> str:
    """The report as HTML text."""
    units, made = items(data, "units"), items(data, "allocations")
    options = shortened(data.get("options", ()))
    rows = [
        {
            "Unit": Cell(str(unit["name"])),
            "Weights": _cell(unit["parameters"], table.count(unit["parameters"])),
            **{text: _cell(score) for text, score in zip(options, unit["scores"], strict=True)},
            **{f"At {one['bits']:.3g} bits": Cell(text) for one, text in zip(made, unit["chosen"], strict=True)},
        }
        for unit in units
    ]
    budgets = [
        {
            "Asked for": Cell(str(one["asked"])),
            "Bits": _cell(one["bits"], table.fixed(one["bits"], 4)),
            "Size": _cell(one["size_bytes"], table.size(one["size_bytes"])),
            "Fixed": _cell(one["fixed_share"], table.percent(one["fixed_share"])),
            "Score": _cell(one["score"]),
            "Solver": Cell(f"{one['solver']}: {one['status']}"),
            "Gap": _cell(one["gap"], _gap(one["gap"])),
        }
        for one in made
    ]
    tables = [
        ("Allocations", "What was asked for, what came of it, and how much better another choice could be.", budgets),
        ("Units", f"{UNITS} Click a heading to sort.", rows),
    ]
    settings = (("Settings", section(data, "settings")), ("Provenance", section(data, "provenance")))
    return environment().get_template("template.html").render(
        kind="allocation", name=table.plain(section(data, "model").get("name") or "Model"),
        about=about(section(data, "model")), made_by=section(data, "provenance").get("dither"), summary=[], failures=[],
        settings=[(title, table.flat(values)) for title, values in settings if values], meaning={}, comparison=[],
        starts=(), layers=[], reasons=[], coverage=[], statuses=[],
        plots=[
            Plot("Sensitivity", UNITS, Markup(scores_plot(data))),
            Plot("Budget", FRONTIER, Markup(frontier_plot(data))),
        ],
        tables=[
            {"title": title, "caption": caption, "id": title.lower(), "rows": found}
            for title, caption, found in tables if found
        ],
    )  # fmt: skip


def scores_plot(data: Mapping[str, Any]) -> str:
    """A line for each option over the units in execution order."""
    units = items(data, "units")
    names = [str(unit["name"]) for unit in units]
    options = shortened(data["options"])
    known = [score for unit in units for score in unit["scores"] if score]
    with canvas.style("scores"):
        drawn = canvas.figure(3.6)
        ax = drawn.subplots()
        canvas.place(drawn, 0.85, 0.15, 0.35, 0.5)
        canvas.shade_blocks(ax, names, rows=False)
        for index, option in enumerate(options):
            points = [(x, unit["scores"][index] or 0.0) for x, unit in enumerate(units)]
            canvas.line(ax, points, index, option)
            if units and units[0]["errors"] is not None:
                spread = [unit["errors"][index] or 0.0 for unit in units]
                low = [min(error, 0.9 * score) for (_, score), error in zip(points, spread, strict=True)]
                ax.errorbar(
                    [x for x, _ in points], [y for _, y in points], yerr=[low, spread], fmt="none",
                    ecolor=canvas.MUTED, elinewidth=0.6, zorder=1,
                )  # fmt: skip
        canvas.log_axis(ax, "y", known)
        canvas.block_ticks(ax, names)
        ax.set_ylabel(f"score ({section(data, 'settings').get('sensitivity', '')})")
        canvas.legend(ax, [canvas.mark(index, option) for index, option in enumerate(options)])
        return canvas.svg(drawn, "Scores of the units", f"{len(names)} units, formats {', '.join(options)}.")


def frontier_plot(data: Mapping[str, Any]) -> str:
    """The hull, the allocations on it, and one format everywhere."""
    corners, made, same = items(data, "frontier"), items(data, "allocations"), items(data, "uniform")
    names = shortened([row["option"] for row in same])
    known = [float(row["score"]) for row in (*corners, *made, *same) if row["score"]]
    with canvas.style("frontier"):
        drawn = canvas.figure(3.4)
        ax = drawn.subplots()
        canvas.place(drawn, 0.85, canvas.label_margin(["", *names]), 0.35, 0.45)
        ax.plot(
            [row["bits"] for row in corners], [row["score"] or math.nan for row in corners], color=canvas.PALETTE[0]
        )
        ax.plot([row["bits"] for row in made], [row["score"] for row in made], "o", color=canvas.PALETTE[1])
        ax.plot([row["bits"] for row in same], [row["score"] for row in same], "x", color=canvas.MUTED)
        for name, row in zip(names, same, strict=True):
            ax.annotate(name, (row["bits"], row["score"]), (4, 4), textcoords="offset points", color=canvas.MUTED)
        canvas.log_axis(ax, "y", known)
        ax.set_xlabel("stored bits a weight")
        ax.set_ylabel("total score")
        marks = [("best within each budget", 0), ("allocations", 1)][: 2 if made else 1]
        canvas.legend(ax, [canvas.mark(index, text) for text, index in marks])
        return canvas.svg(drawn, "Score against bits", f"{len(corners)} corners, {len(made)} allocations.")


def _gap(gap: float | None) -> str:
    """In percent; what a solver's rounding leaves is no gap."""
    if gap is None:
        return "unknown"
    return "0 %" if abs(gap) < _ROUNDING else f"{100 * gap:.2g} %"


def _asked(one: Allocation) -> str:
    parts = []
    for name, budget in one.requested.items():
        bits = name == SIZE and one.parameters
        parts.append(f"{budget / one.parameters:.4g} bits" if bits else f"{name} {budget:.4g}")
    return ", ".join(parts)


def _summary(one: Allocation) -> dict[str, Any]:
    return {
        "asked": _asked(one),
        "bits": one.bits,
        "size_bytes": one.size_bytes,
        "fixed_share": one.fixed_share,
        "score": one.score,
        "solver": one.solver,
        "status": one.status,
        "gap": one.gap,
    }


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _cell(value: object, text: str | None = None) -> Cell:
    known = number(value)
    return Cell(table.significant(value) if text is None else text, known, numeric=True)
