"""Tables and plot of benchmarks/allocation.py."""

import io
import math
import statistics
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

KEYS = ("model", "method", "bits")
Rows = dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]]


def groups(found: dict[str, Any]) -> Rows:
    """(model, method, bits) → allocator → its runs."""
    made: Rows = {}
    for one in sorted(found["runs"], key=lambda one: [one[key] for key in KEYS]):
        made.setdefault(tuple(one[key] for key in KEYS), {}).setdefault(one["allocator"], []).append(one)
    return made


def report(found: dict[str, Any]) -> str:
    """Markdown: a table for each model, method and budget; costs; the exhaustive search."""
    lines = [
        "# Which bits where: allocators at equal size",
        "",
        "Weights only. Each budget is the size that so many bits take everywhere, scales and zero-points included. "
        "`uniform` has that one format everywhere, between two whole numbers of bits an even mix of both; `random` are "
        "allocations of the same size drawn at random. Means ± standard deviation over calibration draws (random: over "
        "allocations). KL is to the full-precision model, in nats; † marks allocators that are not better than uniform "
        "by it. Scores are of the nearest codes, those of `+method=gptq` of the weights that GPTQ gives, on another "
        "draw of samples than it was given, or with `+judged=same` on the same. "
        "Written by `benchmarks/allocation.py`.",
    ]
    for model, facts in found["facts"].items():
        lines += ["", f"## {model}", "", _about(facts)]
        for (name, method, bits), rows in groups(found).items():
            if name == model:
                lines += ["", f"### {method}, {bits:g} bits", "", *_table(rows)]
    return "\n".join([*lines, *_costs(found), *_exhaustive(found)]) + "\n"


def _about(facts: dict[str, Any]) -> str:
    tokens = "" if facts["length"] is None else f" × {facts['length']} tokens"
    quality = {"top1": "top-1", "perplexity": "perplexity"}
    full = ", ".join(f"{quality[key]} {facts[key]:.4g}" for key in quality if facts.get(key) is not None)
    return (
        f"Full precision: {full} on {facts['count']} of `{facts['evaluation']}`. Formats `{facts['format']}` with "
        f"2, 3, 4, 5, 6 and 8 bits. Calibration: {facts['samples']}{tokens} of `{facts['calibration']}`. "
        f"{facts['device']}, torch {facts['torch']}."
    )


def _table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    metric = "perplexity" if next(iter(rows.values()))[0].get("perplexity") is not None else "top1"
    base = _mean(rows.get("uniform", []), "kl")
    lines = [f"| allocator | bits | {metric} | KL | KL / uniform | runs |", "|---|---|---|---|---|---|"]
    for name, runs in sorted(rows.items(), key=lambda row: _mean(row[1], "kl")):
        kl = _mean(runs, "kl")
        mark = " †" if name not in ("uniform", "random") and kl >= base else ""
        lines.append(
            f"| {name}{mark} | {_mean(runs, 'achieved_bits'):.3f} | {_spread(runs, metric)} | {_spread(runs, 'kl')} | "
            f"{kl / base:.2f} | {len(runs)} |"
        )
    return lines


def _costs(found: dict[str, Any]) -> list[str]:
    """Seconds of each measurement; solving takes what is left of `choose_s`, which a kept table does not pay for."""
    seen: dict[tuple[str, str], list[float]] = {}
    for one in found["runs"]:
        if one.get("measure_s") is not None:
            seen.setdefault((one["allocator"], one["model"]), []).append(one["measure_s"])
    if not seen:
        return []
    models = list(found["facts"])
    lines = ["", "## Seconds to measure", "", f"| allocator | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for name in dict.fromkeys(name for name, _ in seen):
        cells = [f"{statistics.median(seen[name, m]):.1f}" if (name, m) in seen else "–" for m in models]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _exhaustive(found: dict[str, Any]) -> list[str]:
    lines = []
    for title, one in found["exhaustive"].items():
        lines += [
            "",
            f"## Against all choices: {title}",
            "",
            f"{len(one['units'])} units of 2 or 4 bits, the rest in full precision; {one['fitting']} of "
            f"{one['choices']} choices fit the size of half of each. The best has a KL of {one['best']:.3g} on "
            f"evaluation data, those that fill the budget {one['random']:.3g} on average.",
            "",
            "| allocator | KL | over the best | rank |",
            "|---|---|---|---|",
        ]
        for name, row in sorted(one["allocators"].items(), key=lambda row: row[1]["kl"]):
            lines.append(f"| {name} | {row['kl']:.3g} | {row['kl'] / one['best'] - 1:.0%} | {row['rank']} |")
    return lines


def plot(found: dict[str, Any]) -> str:
    """KL over uniform's, a panel for each model and method."""
    rows = groups(found)
    panels = list(dict.fromkeys(key[:2] for key in rows))
    names = list(dict.fromkeys(name for group in rows.values() for name in group if name != "uniform"))
    with matplotlib.rc_context({"svg.hashsalt": "allocation", "font.size": 8}):
        drawn = Figure(figsize=(3.2 * len(panels) + 0.8, 3.4), layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, panel in zip(axes, panels, strict=True):
            for index, name in enumerate(names):
                points = [
                    (key[2], _mean(group[name], "kl") / _mean(group["uniform"], "kl"))
                    for key, group in rows.items()
                    if key[:2] == panel and name in group and "uniform" in group
                ]
                style = {"color": "#8b8f97", "linestyle": ":"} if name == "random" else {"color": f"C{index % 10}"}
                ax.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name, **style)
            ax.axhline(1.0, color="black", linewidth=0.8)
            ax.set_yscale("log")
            ax.set_title(f"{panel[0]}, {panel[1]}")
            ax.set_xlabel("bits of the codes")
        axes[0].set_ylabel("KL / KL of uniform")
        axes[-1].legend(frameon=False, fontsize=7)
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().strip()


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    known = [one[key] for one in runs if one.get(key) is not None]
    return statistics.fmean(known) if known else math.inf


def _spread(runs: list[dict[str, Any]], key: str) -> str:
    known = [one[key] for one in runs if one.get(key) is not None]
    if len(known) < len(runs):
        return "diverges"
    spread = f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.4g}{spread}"
