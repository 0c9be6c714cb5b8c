"""What a report shows of methods without data: distilled pictures and their loss, the Pareto front, pruned widths."""

import re
from collections.abc import Mapping
from typing import Any

from dither.report import canvas
from dither.report.canvas import INK, MUTED
from dither.report.data import items, number, section
from dither.report.table import count, size

PICTURES = (
    "Made from the model's batch normalizations alone, in place of calibration data; each is stretched to the full "
    "range of brightness."
)
LOSS = (
    "Left: squared distance of the pictures' channel means and deviations from those that the normalizations stored, "
    "summed over all. Right: what is left of it, in stored deviations, normalization by normalization."
)
FRONT = (
    "Every size that some choice of bits reaches with less divergence than all smaller ones, by dynamic programming "
    "over each layer's own divergence; the choice made, and the same bits everywhere."
)
WIDTHS = "Output channels that are left of each pruned layer, and those it had."
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def pictures_figure(data: Mapping[str, Any]) -> str | None:
    """The sheet of distilled pictures as an image that lies in the file itself."""
    sheet = section(data, "distilled").get("pictures")
    if not isinstance(sheet, str) or not _BASE64.fullmatch(sheet):
        return None
    return (
        '<img alt="distilled pictures" style="width: 100%; image-rendering: pixelated" '
        f'src="data:image/png;base64,{sheet}">'
    )


def loss_plot(data: Mapping[str, Any]) -> str | None:
    """The loss of distillation over its steps, and what is left at each normalization."""
    distilled = section(data, "distilled")
    points = [(number(row.get("step")), number(row.get("loss"))) for row in items(distilled, "loss")]
    known = [(step, loss) for step, loss in points if step is not None and loss is not None and loss > 0]
    gaps = items(distilled, "gaps")
    if not known:
        return None
    with canvas.style("distillation"):
        drawn = canvas.figure(3.2)
        left, right = drawn.subplots(1, 2)
        canvas.place(drawn, 0.75, 0.15, 0.45, 0.55, space=0.75)
        canvas.log_axis(left, "y", [loss for _, loss in known])
        left.plot([step for step, _ in known], [loss for _, loss in known], color=INK, linewidth=1.2)
        left.set_xlabel("step")
        left.set_ylabel("loss")
        left.grid()
        for index, key in enumerate(("mean", "std")):
            values = [number(row.get(key)) for row in gaps]
            canvas.line(right, [(i, x) for i, x in enumerate(values) if x is not None], index, key)
        right.set_xlabel("normalization, in order")
        right.set_ylabel("distance")
        right.grid()
        canvas.legend(right, [canvas.mark(0, "mean"), canvas.mark(1, "deviation")])
        text = f"The loss falls from {known[0][1]:.3g} to {known[-1][1]:.3g} in {known[-1][0]:.0f} steps."
        return canvas.svg(drawn, "Distillation", text)


def front_plot(data: Mapping[str, Any]) -> str | None:
    """Divergence against size: the front, uniform bits, the choice."""
    pareto = section(data, "pareto")
    front = _points(items(pareto, "points"))
    uniform = _points(items(pareto, "uniform"))
    if not front:
        return None
    chosen = _points([section(pareto, "chosen")])
    with canvas.style("pareto"):
        drawn = canvas.figure(3.6)
        ax = drawn.subplots(1, 1)
        canvas.place(drawn, 0.75, 0.15, 0.45, 0.55)
        canvas.log_axis(ax, "y", [kl for _, kl in [*front, *uniform] if kl > 0])
        for index, (points, style) in enumerate(((front, "-"), (uniform, ""), (chosen, ""))):
            look = canvas.mark(index, "")
            ax.plot(
                [x / 1e6 for x, kl in points if kl > 0],
                [kl for _, kl in points if kl > 0],
                color=look.get_color(),
                linestyle=style,
                marker="" if style else look.get_marker(),
                markersize=7,
                linewidth=1.2,
            )
        for row, (x, kl) in zip(items(pareto, "uniform"), uniform, strict=False):
            if kl > 0:
                ax.annotate(
                    f"{row.get('bits')} bits", (x / 1e6, kl), xytext=(6, 4), textcoords="offset points", color=MUTED
                )
        ax.set_xlabel("size of the model in MB")
        ax.set_ylabel("sum of divergences, nats")
        ax.grid()
        names = ("Pareto front", "the same bits everywhere", "chosen")
        canvas.legend(ax, [canvas.mark(index, name) for index, name in enumerate(names)])
        text = f"{count(pareto.get('length'))} points; chosen: {size(section(pareto, 'chosen').get('size_bytes'))}."
        return canvas.svg(drawn, "Pareto front", text)


def widths_plot(data: Mapping[str, Any]) -> str | None:
    """Channels before and after pruning, layer by layer."""
    rows = items(section(data, "pruning"), "layers")
    pairs = [(str(row.get("name")), number(row.get("before")), number(row.get("after"))) for row in rows]
    known = [(name, before, after) for name, before, after in pairs if before is not None and after is not None]
    if not known:
        return None
    names = [name for name, _, _ in known]
    with canvas.style("widths"):
        height = 0.2
        drawn = canvas.figure(0.9 + height * max(3, len(known)))
        ax = drawn.subplots(1, 1)
        places, labels = canvas.row_labels(names, height)
        canvas.place(drawn, canvas.label_margin(labels), 0.15, 0.35, 0.45)
        ax.barh(range(len(known)), [before for _, before, _ in known], height=0.72, color=canvas.PALETTE[0], alpha=0.25)
        ax.barh(range(len(known)), [after for _, _, after in known], height=0.72, color=canvas.PALETTE[0])
        ax.set_yticks(places, labels)
        ax.set_ylim(len(known) - 0.5, -0.5)
        ax.set_xlabel("output channels")
        total = sum(before for _, before, _ in known), sum(after for _, _, after in known)
        return canvas.svg(drawn, "Pruned widths", f"{total[1]:.0f} of {total[0]:.0f} channels are left.")


def _points(rows: Any) -> list[tuple[float, float]]:
    found = [(number(row.get("size_bytes")), number(row.get("kl"))) for row in rows]
    return [(x, kl) for x, kl in found if x is not None and kl is not None]
