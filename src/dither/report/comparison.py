"""Plots of a comparison: quality and time per method, quality against bits, error per layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from dither.report import canvas
from dither.report.canvas import INK, MUTED
from dither.report.data import MethodSummary, Spread, items, method_summaries, number, quality_metric, section
from dither.report.table import seconds

TITLES = {
    "top1": "top-1, %", "perplexity": "perplexity", "agreement": "agreement with full precision, %",
    "sqnr_db": "SQNR, dB",
}  # fmt: skip
FACTOR = {"top1": 100.0, "perplexity": 1.0, "agreement": 100.0, "sqnr_db": 1.0}
KNOWN = ("top1", "perplexity")  # what full precision has a value of that is not trivial
LOG_TIME = 20.0  # slowest over fastest from which bars of time need a log axis
LEAST_SPAN = 0.1  # bits per weight; below it all results stand above one point


def methods_plot(data: Mapping[str, Any]) -> str | None:
    """Per method and setting: quality of every seed with mean ± standard deviation, and the time it took."""
    rows, metric = method_summaries(data), quality_metric(data)
    draw_quality = any(row.metrics[metric] for row in rows)
    draw_time = any(row.metrics["time_s"] for row in rows)
    if not draw_quality and not draw_time:
        return None
    places, labels, headers = _places(rows)
    with canvas.style("methods"):
        drawn = canvas.figure(0.95 + 0.21 * len(labels))
        axes = drawn.subplots(1, draw_quality + draw_time, sharey=True, squeeze=False)[0]
        canvas.place(drawn, canvas.label_margin(labels), 0.55, 0.4, 0.5, space=0.35)
        if draw_quality:
            _quality(axes[0], data, rows, places, metric)
        if draw_time:
            _time(axes[-1], rows, places)
        axes[0].set_yticks(range(len(labels)), labels)
        for index, text in enumerate(axes[0].get_yticklabels()):
            text.set_fontweight("bold" if index in headers else "normal")
        axes[0].set_ylim(len(labels) - 0.4, -0.6)
        return canvas.svg(
            drawn, "Quality and time per method", f"{len(rows)} methods and settings, ranked by {metric}."
        )


def _places(rows: Sequence[MethodSummary]) -> tuple[list[int], list[str], set[int]]:
    """The line of each row, all lines' labels, and which lines are headers: a setting's name above its methods."""
    places: list[int] = []
    labels: list[str] = []
    headers: set[int] = set()
    for index, row in enumerate(rows):
        if row.setting and (index == 0 or rows[index - 1].setting != row.setting):
            headers.add(len(labels))
            labels.append(row.setting)
        places.append(len(labels))
        labels.append(row.label if len(row.label) <= canvas.TEXT_LIMIT else row.label[: canvas.TEXT_LIMIT - 1] + "…")
    return places, labels, headers


def _quality(
    ax: Axes, data: Mapping[str, Any], rows: Sequence[MethodSummary], places: Sequence[int], metric: str
) -> None:
    factor = FACTOR[metric]
    shades = _indices(rows)
    for row, y in zip(rows, places, strict=True):
        ax.axhline(y, color=canvas.GRID, linewidth=0.6, zorder=0)
        cell = row.metrics[metric]
        if cell is None:
            continue
        shade = canvas.mark(shades[row.label], "").get_color()
        values = [factor * value for value in row.values[metric]]
        ax.scatter(values, [y] * len(values), s=11, color=shade, alpha=0.35, linewidths=0)
        spread = None if cell.std is None else factor * cell.std
        ax.errorbar(
            factor * cell.mean, y, xerr=spread, color=shade, marker="o", markersize=5, capsize=2.5, elinewidth=1.2
        )
    reference = _reference(data, metric)
    if reference is not None:
        ax.axvline(reference, color=INK, linewidth=0.9, linestyle="--")
        ax.annotate(
            f"full precision {reference:.1f}",
            (reference, 1),
            (-4, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(TITLES[metric])


def _time(ax: Axes, rows: Sequence[MethodSummary], places: Sequence[int]) -> None:
    known = [(y, row, cell) for y, row in zip(places, rows, strict=True) if (cell := row.metrics["time_s"])]
    means = [cell.mean for _, _, cell in known if cell.mean > 0]
    log = bool(means) and max(means) > LOG_TIME * min(means)
    low = canvas.log_axis(ax, "x", means, pad=2.5) if log else 0.0
    shades = _indices(rows)
    for y, row, cell in known:
        shade = canvas.mark(shades[row.label], "").get_color()
        ax.barh(y, max(0.0, cell.mean - low), left=low, height=0.55, color=shade, alpha=0.85)
        if cell.std is not None:
            ends = [max(low, cell.mean - cell.std), cell.mean + cell.std]
            ax.plot(ends, [y, y], color=MUTED, linewidth=1.0)
        ax.annotate(
            seconds(cell.mean),
            (cell.mean + (cell.std or 0.0), y),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
        )
    if not log:
        ax.grid(axis="x")
        ax.set_xlim(0, 1.15 * max((cell.mean + (cell.std or 0) for _, _, cell in known), default=1.0) or 1.0)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("seconds" + (", log scale" if log else ""))


def tradeoff_plot(data: Mapping[str, Any]) -> str | None:
    """Quality against bits per weight, a panel per activation format; None when all rows have about the same bits."""
    rows, metric = method_summaries(data), quality_metric(data)
    points = [
        (row, bits.mean, cell)
        for row in rows
        if (bits := row.metrics["bits_per_weight"]) and (cell := row.metrics[metric])
    ]
    if not points or max(x for _, x, _ in points) - min(x for _, x, _ in points) < LEAST_SPAN:
        return None
    panels = list(dict.fromkeys(row.activations for row, _, _ in points))
    shades = _indices(rows)
    labels = [label for label in shades if any(row.label == label for row, _, _ in points)]
    reference = _reference(data, metric)
    with canvas.style("tradeoff"):
        drawn = canvas.figure(3.9)
        axes = drawn.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        canvas.place(drawn, 0.6, canvas.label_margin([*labels, "full precision"]) + 0.45, 0.35, 0.5, space=0.2)
        for ax, activations in zip(axes, panels, strict=True):
            _tradeoff(ax, [point for point in points if point[0].activations == activations], shades, metric)
            if reference is not None:
                ax.axhline(reference, color=INK, linewidth=0.9, linestyle="--")
            ax.set_title(f"activations {activations}" if activations else "")
            ax.set_xlabel("bits per weight")
            ax.grid()
        axes[0].set_ylabel(TITLES[metric])
        handles = [canvas.mark(shades[label], label) for label in labels]
        if reference is not None:
            handles.insert(0, Line2D([], [], color=INK, linewidth=0.9, linestyle="--", label="full precision"))
        axes[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), handlelength=2.4)
        return canvas.svg(drawn, "Quality against bits per weight", f"{len(labels)} methods, {TITLES[metric]}.")


def _tradeoff(
    ax: Axes, points: Sequence[tuple[MethodSummary, float, Spread]], shades: Mapping[str, int], metric: str
) -> None:
    for label in dict.fromkeys(row.label for row, _, _ in points):
        found = sorted((x, cell.mean, cell.std or 0.0) for row, x, cell in points if row.label == label)
        look = canvas.mark(shades[label], label)
        ax.errorbar(
            [x for x, _, _ in found],
            [FACTOR[metric] * mean for _, mean, _ in found],
            yerr=[FACTOR[metric] * std for _, _, std in found],
            color=look.get_color(),
            linestyle=look.get_linestyle(),
            marker=look.get_marker(),
            markersize=4.5,
            linewidth=1.2,
            capsize=2,
            elinewidth=0.9,
        )


def layer_lines_plot(data: Mapping[str, Any]) -> str | None:
    """Relative output error through the layers, mean over seeds, one panel per setting and one line per method."""
    rows = [row for row in method_summaries(data) if row.errors]
    names = list(
        dict.fromkeys(str(layer.get("name", "")) for run in items(data, "runs") for layer in items(run, "layers"))
    )
    if not rows or not any(error > 0 for row in rows for error in row.errors.values()):
        return None
    settings = list(dict.fromkeys(row.setting for row in rows))
    shades = _indices(method_summaries(data))
    labels = [label for label in shades if any(row.label == label for row in rows)]
    legend_rows = -(-len(labels) // 8)
    with canvas.style("layer-lines"):
        top = 0.4 + 0.17 * legend_rows
        drawn = canvas.figure(top + 0.5 + 2.3 * len(settings))
        axes = drawn.subplots(len(settings), 1, sharex=True, squeeze=False)[:, 0]
        canvas.place(drawn, 0.75, 0.15, top, 0.5)
        for ax, name in zip(axes, settings, strict=True):
            panel = [row for row in rows if row.setting == name]
            canvas.log_axis(ax, "y", [error for row in panel for error in row.errors.values()])
            canvas.shade_blocks(ax, names, rows=False)
            for row in panel:
                points = [(i, row.errors.get(layer, float("nan"))) for i, layer in enumerate(names)]
                canvas.line(ax, points, shades[row.label], row.label)
            ax.set_title(name if len(settings) > 1 else "", pad=4)
            ax.set_ylabel("output error, log")
        canvas.block_ticks(axes[-1], names)
        drawn.legend(
            handles=[canvas.mark(shades[label], label) for label in labels],
            loc="upper left",
            bbox_to_anchor=(0.6 / canvas.WIDTH, 1.0),
            ncols=8,
        )
        return canvas.svg(
            drawn, "Output error per layer and method", f"{len(labels)} methods over {len(names)} layers."
        )


def _indices(rows: Sequence[MethodSummary]) -> dict[str, int]:
    """A look per label, the same in every plot: by name, so that a method keeps it whatever its rank."""
    return {label: index for index, label in enumerate(sorted({row.label for row in rows}))}


def _reference(data: Mapping[str, Any], metric: str) -> float | None:
    """The full-precision value of a metric, where that is not trivial."""
    known = number(section(data, "reference").get(metric)) if metric in KNOWN else None
    return None if known is None else FACTOR[metric] * known
