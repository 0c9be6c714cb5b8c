"""The shared table and plot of weight methods on a language model: dither's and other tools' rows."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

OURS = "dither"
DATA = ("model", "windows", "window_length", "samples", "length")  # what must agree for two rows to be compared


def peer_runs(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of other tools on the same data, in the form of ours."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    same = [one for one in runs if all(one[key] == facts[key] for key in DATA)]
    elsewhere = dict.fromkeys(("time_s", "cpu_s", "peak_bytes"))  # costs on another device are not comparable
    here = facts["device"].split(", ")
    return [one | peer_names(one) | (elsewhere if one["device"] not in here else {}) for one in same]


def peer_names(one: dict[str, Any]) -> dict[str, str]:
    """What a row calls another tool's run."""
    label = {"llmcompressor": "gptq", "bitsandbytes": "nf4"}.get(one["peer"], one["peer"])
    changed = [f"{key} {str(value).lower()}" for key, value in one["options"].items()]
    kind = "nf" if one["peer"] == "bitsandbytes" else "int"
    return {
        "label": ", ".join([label, *changed]),
        "tool": f"{one['peer']} {'.'.join(one['version'].split('.')[:3])}",  # not its packaging
        "weights": f"{kind}{one['bits']}:g{one['group_size']}",
    }


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ only in the calibration draw as one row, from more bits to fewer and from good to bad."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one.get("tool", OURS), one["label"], one["weights"] or "its own"), []).append(one)
    made = []
    for (tool, label, weights), group in groups.items():
        known = [one["perplexity"] for one in group if one["perplexity"] is not None]
        made.append({
            "tool": tool, "label": label, "weights": weights, "draws": len(group),
            "bits": statistics.fmean(one["bits_per_weight"] for one in group),
            "perplexity": statistics.fmean(known) if len(known) == len(group) else math.inf,
            "spread": statistics.stdev(known) if len(known) > 1 else None,
            **{key: _median([one[key] for one in group]) for key in ("time_s", "cpu_s", "peak_bytes")},
        })  # fmt: skip
    return sorted(made, key=lambda row: (-int(row["bits"]), row["perplexity"]))


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(made: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown: a table for each number of bits (4 to 4.99, 3 to 3.99, …), the best first."""
    words = "all" if facts["windows"] == 0 else f"the first {facts['windows']}"
    lines = [
        "# Weight methods on a language model",
        "",
        f"`{facts['model']}` ({facts['parameters'] / 1e6:.0f} M parameters), perplexity on {words} windows of "
        f"{facts['window_length']} tokens of `{facts['evaluation']}`; full precision {facts['fp_perplexity']:.2f}. "
        f"Calibration: {facts['samples']} × {facts['length']} tokens of `{facts['calibration']}`, mean ± standard "
        "deviation over the draws. All linear layers of the blocks are quantized; bits count codes, scales, "
        "zero-points, outliers, codebooks and factors. Time is the machine's and the processor's, memory is the peak "
        f"above one float32 copy of the model; up to {facts['at_once']} runs shared a GPU, so that seconds are longer "
        "than alone (`benchmarks/llm_cost.py` has these). Written by `benchmarks/llm_methods.py` on "
        f"{facts['device']}, torch {facts['torch']}; other tools by `benchmarks/llm_peers.py`.",
    ]
    for bits in dict.fromkeys(int(row["bits"]) for row in made):
        lines += ["", f"## {bits} to {bits + 1} bits", ""]
        lines += ["| method | tool | format | bits | perplexity | gap | draws | seconds | CPU s | peak MiB |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(row, facts["fp_perplexity"]) for row in made if int(row["bits"]) == bits]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], reference: float) -> str:
    spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
    gap = row["perplexity"] - reference
    peak = row["peak_bytes"] and row["peak_bytes"] / 2**20
    costs = " | ".join("–" if value is None else f"{value:.0f}" for value in (row["time_s"], row["cpu_s"], peak))
    return (
        f"| {row['label']} | {row['tool']} | {row['weights']} | {row['bits']:.3f} | {row['perplexity']:.2f}{spread} "
        f"| {gap:+.2f} | {row['draws']} | {costs} |"
    )


def plot(made: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Perplexity against bits: a line for each method of ours, hollow marks for other tools."""
    from dither.report import canvas

    shown = [row for row in made if math.isfinite(row["perplexity"])]
    names = list(dict.fromkeys((row["tool"], row["label"]) for row in shown))
    with canvas.style("llm"):
        drawn = canvas.figure(4.6)
        axes = drawn.subplots()
        canvas.place(drawn, 0.75, 2.6, 0.3, 0.5)
        canvas.log_axis(axes, "y", [row["perplexity"] for row in shown] + [facts["fp_perplexity"]], pad=1.1)
        marks = []
        for index, (tool, label) in enumerate(names):
            mine = [row for row in shown if (row["tool"], row["label"]) == (tool, label)]
            points = sorted((row["bits"], row["perplexity"]) for row in mine)
            mark = canvas.mark(index, label if tool == OURS else f"{label} ({tool})")
            if tool != OURS:
                mark.set(linestyle="none", markerfacecolor="none")
            axes.plot(
                [x for x, _ in points], [y for _, y in points], color=mark.get_color(), marker=mark.get_marker(),
                linestyle=mark.get_linestyle(), markerfacecolor=mark.get_markerfacecolor(), markersize=4, linewidth=1,
            )  # fmt: skip
            marks.append(mark)
        axes.axhline(facts["fp_perplexity"], color=canvas.INK, linewidth=0.9, linestyle="--")
        axes.set_xlabel("bits per weight, everything counted")
        axes.set_ylabel("perplexity, log scale")
        axes.legend(handles=marks, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return canvas.svg(drawn, "Perplexity against bits per weight", f"{len(shown)} methods and formats.")
