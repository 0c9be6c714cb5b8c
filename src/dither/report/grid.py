"""The table of a study of weights, activations and both: a row a weight format, a column an activation format."""

from collections.abc import Mapping
from typing import Any

from dither.report.data import items, number, section
from dither.report.table import fixed

FULL = "full precision"


def grid_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """Perplexity and its increase over full precision for each method and weight format, by activation format."""
    reference = number(section(data, "reference").get("perplexity"))
    columns = [str(text) for text in section(data, "grid").get("activations", ())]
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for run in items(data, "runs"):
        weights, _, asked = str(run["label"]).partition(" / ")
        method, _, form = weights.partition(" ")
        found.setdefault((method, form), {})[asked] = run
    if "none" in columns:
        found = {("none", ""): {}} | found
        found["none", ""]["none"] = section(data, "reference")
    rows = []
    for (method, form), runs in found.items():
        bits = next((run.get("bits_per_weight") for run in runs.values() if form), None)
        row = {"Method": "–" if method == "none" else method, "Weights": form or FULL, "Bits": fixed(bits)}
        rows.append(row | {name: _cell(runs.get(name), reference) for name in columns})
    return rows


def _cell(run: Mapping[str, Any] | None, reference: float | None) -> str:
    value = None if run is None else number(run.get("perplexity"))
    if value is None:
        return "–"
    return fixed(value) if reference is None or value == reference else f"{value:.2f} ({value - reference:+.2f})"


def grid_markdown(data: Mapping[str, Any]) -> str:
    """The study as a page."""
    rows, evaluation = grid_rows(data), section(data, "evaluation")
    name, source, windows = section(data, "model").get("name"), evaluation.get("source"), evaluation.get("count")
    lines = [
        "# Weights, activations and both",
        "",
        f"`{name}`, perplexity on {windows} windows of {source}, its increase over full precision in brackets. Columns "
        "name the format of the inputs of the linear layers; attention products and embeddings stay in full precision.",
        "",
    ]
    if rows:
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    lines += [f"- failed: {one['method']}: {one['error']}" for one in items(data, "failures")]
    return "\n".join(lines) + "\n"
