"""Plots of one quantized model: error and range per layer, stored bytes, error of attention operands."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dither.report import canvas
from dither.report.canvas import INK, MUTED, PALETTE
from dither.report.data import interval, items, number, section
from dither.report.table import size

RANGE_RATIO = 30.0  # a widest range this many times the typical one hides the others on a linear axis


def layers_plot(data: Mapping[str, Any]) -> str | None:
    """Per layer: relative output error and, where known, the input's range against what its quantizer represents."""
    layers = items(data, "layers")
    names = [str(layer.get("name", "")) for layer in layers]
    errors = [number(layer.get("output_error")) for layer in layers]
    seen = [interval(layer.get("input_range")) for layer in layers]
    clipped = [interval(layer.get("clip_range")) for layer in layers]
    draw_error, draw_range = any(error is not None for error in errors), any(seen) or any(clipped)
    if not draw_error and not draw_range:
        return None
    with canvas.style("layers"):
        row = 0.155 if len(layers) <= 80 else max(0.055, 12.0 / len(layers))
        drawn = canvas.figure(1.15 + row * max(4, len(layers)))
        places, labels = canvas.row_labels(names, row)
        axes = drawn.subplots(1, draw_error + draw_range, sharey=True, squeeze=False)[0]
        canvas.place(drawn, canvas.label_margin(labels), 0.15, 0.65, 0.45)
        if draw_error:
            _errors(axes[0], names, errors)
        if draw_range:
            _ranges(axes[-1], names, seen, clipped)
        axes[0].set_yticks(places, labels)
        axes[0].set_ylim(len(layers) - 0.5, -0.5)
        known = [(error, name) for error, name in zip(errors, names, strict=True) if error is not None]
        worst = f" The largest output error is {max(known)[0]:.3g} at {max(known)[1]}." if known else ""
        return canvas.svg(
            drawn, "Output error and input range per layer", f"{len(layers)} layers in execution order.{worst}"
        )


def _errors(ax: Axes, names: Sequence[str], errors: Sequence[float | None]) -> None:
    shades, legend = canvas.role_colours(names)
    known = [(i, error) for i, error in enumerate(errors) if error is not None]
    low = canvas.log_axis(ax, "x", [error for _, error in known])
    canvas.shade_blocks(ax, names, rows=True)
    drawn = [(i, error) for i, error in known if error > low]
    ax.barh(
        [i for i, _ in drawn],
        [error - low for _, error in drawn],
        left=low,
        height=0.72,
        color=[shades[i] for i, _ in drawn],
    )
    for i, error in enumerate(errors):
        if error is None or error <= low:
            ax.text(low * 1.05, i, "0" if error is not None else "–", va="center", ha="left", color=MUTED, fontsize=7)
    ax.set_xlabel("relative output error, log scale")
    ax.tick_params(axis="y", length=0)
    if len(legend) > 1:
        canvas.legend(ax, [Patch(color=shade, label=name) for name, shade in legend.items()], columns=4)


def _ranges(
    ax: Axes,
    names: Sequence[str],
    seen: Sequence[tuple[float, float] | None],
    clipped: Sequence[tuple[float, float] | None],
) -> None:
    canvas.shade_blocks(ax, names, rows=True)
    for i, (inputs, grid) in enumerate(zip(seen, clipped, strict=True)):
        if grid:
            ax.barh(i, grid[1] - grid[0], left=grid[0], height=0.72, color=PALETTE[4], alpha=0.55, linewidth=0)
        if inputs:
            ax.plot(inputs, (i, i), color=INK, linewidth=0.9, marker="|", markersize=3.5, markeredgewidth=0.9)
    ends = [max(abs(low), abs(high)) for pair in (*seen, *clipped) if pair for low, high in [pair]]
    typical = median(ends)
    if typical > 0 and max(ends) > RANGE_RATIO * typical:
        ax.set_xscale("symlog", linthresh=typical)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.axvline(0, color=MUTED, linewidth=0.6)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("input value" + (f", linear up to ±{typical:.2g}, then log" if ax.get_xscale() == "symlog" else ""))
    handles: list[Patch | Line2D] = [
        Line2D([], [], color=INK, linewidth=0.9, marker="|", markersize=4, label="observed input"),
        Patch(color=PALETTE[4], alpha=0.55, label="represented by the quantizer"),
    ]
    canvas.legend(ax, [handle for handle, known in zip(handles, (any(seen), any(clipped)), strict=True) if known])


def size_plot(data: Mapping[str, Any]) -> str | None:
    """Stored bytes before and after, the latter split into quantized layers and what stays in full precision."""
    totals = section(data, "totals")
    before, after = number(totals.get("original_bytes")), number(totals.get("size_bytes"))
    if not before or not after:
        return None
    packed = sum(number(layer.get("nbytes")) or 0.0 for layer in items(data, "layers"))
    parts = [("quantized layers", packed, PALETTE[0]), ("kept in full precision", after - packed, PALETTE[3])]
    if not 0 < packed <= after:
        parts = [("stored", after, PALETTE[0])]
    with canvas.style("size"):
        drawn = canvas.figure(1.35)
        ax = drawn.subplots()
        canvas.place(drawn, 1.0, 1.4, 0.4, 0.15)
        ax.barh(0, before, height=0.55, color=MUTED)
        left = 0.0
        for _, nbytes, shade in parts:
            ax.barh(1, nbytes, left=left, height=0.55, color=shade)
            left += nbytes
        ax.annotate(size(before), (before, 0), (5, 0), textcoords="offset points", va="center")
        ax.annotate(
            f"{size(after)}  ({before / after:.1f}×)", (after, 1), (5, 0), textcoords="offset points", va="center"
        )
        ax.set_yticks([0, 1], ["original", "quantized"])
        ax.set_ylim(1.5, -0.5)
        ax.set_xlim(0, max(before, after))
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0)
        ax.spines["bottom"].set_visible(False)
        canvas.legend(
            ax, [Patch(color=shade, label=f"{name}, {size(nbytes)}") for name, nbytes, shade in parts if nbytes]
        )
        return canvas.svg(drawn, "Stored bytes", f"Original {size(before)}, quantized {size(after)}.")


def operands_plot(data: Mapping[str, Any]) -> str | None:
    """Relative error of the quantized operands of the attention products, one line per operand through the blocks."""
    operands = [(item, error) for item in items(data, "operands") if (error := number(item.get("error"))) is not None]
    if not operands:
        return None
    names = list(dict.fromkeys(str(item.get("name", "")) for item, _ in operands))
    kinds = list(dict.fromkeys(str(item.get("operand", "")) for item, _ in operands))
    with canvas.style("operands"):
        drawn = canvas.figure(2.9)
        ax = drawn.subplots()
        canvas.place(drawn, 0.75, 0.15, 0.4, 0.5)
        canvas.log_axis(ax, "y", [error for _, error in operands])
        canvas.shade_blocks(ax, names, rows=False)
        for i, kind in enumerate(kinds):
            points = [
                (names.index(str(item.get("name", ""))), error)
                for item, error in operands
                if item.get("operand") == kind
            ]
            canvas.line(ax, points, i, kind)
        canvas.block_ticks(ax, names)
        ax.set_ylabel("relative error, log scale")
        canvas.legend(ax, [canvas.mark(i, kind) for i, kind in enumerate(kinds)])
        return canvas.svg(
            drawn, "Error of attention operands", f"{', '.join(kinds)} over {len(names)} attention modules."
        )
