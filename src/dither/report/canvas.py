"""The drawing surface of the report's plots: one look, and SVG that is deterministic and follows the page's theme."""

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from dither.report.data import block, role

WIDTH = 10.6  # inches; at 96 px per inch the report's content width, so that type keeps its size
TEXT_LIMIT = 38  # characters of a layer name that fit beside a plot
CHARACTER = 0.068  # inches per character of tick text, measured: widest system sans at 8 pt
INK, MUTED, GRID, PAPER = "#1f2328", "#667080", "#d9dde3", "#fdfdfe"
PALETTE = (
    "#4477aa",
    "#ee6677",
    "#2a9d5c",
    "#c09a2b",
    "#56b4d9",
    "#aa3377",
    "#9c7a5b",
    "#8b8f97",
)  # after Paul Tol's bright
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
USUAL = 0.7  # share of layers from which one role says nothing about them
LABEL_HEIGHT = 0.13  # inches between two lines of tick text
CROWD = 30  # points of a series from which its marks shrink
LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
THEME = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}  # colours that the page sets as --plot-*
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.parse_math": False,  # a module's name may hold a dollar sign
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Draw with the report's look, whatever the user's matplotlib settings are; `salt` keeps the ids of plots apart."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has its own fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": salt})
        yield


def figure(height: float) -> Figure:
    """An empty figure of the report's width that belongs to no window and to no global state."""
    drawn = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(drawn)
    return drawn


def svg(drawn: Figure, title: str, description: str) -> str:
    """The figure as inline SVG with a title and description for screen readers; equal figures give equal text."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", text)
    for colour, name in THEME.items():
        text = text.replace(colour, f"var(--plot-{name}, {colour})")
    words = f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>"
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{words}{body}'.strip()


def place(drawn: Figure, left: float, right: float, top: float, bottom: float, space: float = 0.3) -> None:
    """Set the margins around the plots in inches, which, unlike fractions, do not depend on the figure's height."""
    height = float(drawn.get_figheight())
    drawn.subplots_adjust(left / WIDTH, bottom / height, 1 - right / WIDTH, 1 - top / height)
    columns = max(1, len({ax.get_position().x0 for ax in drawn.axes}))
    inner = (WIDTH - left - right - space * (columns - 1)) / columns
    drawn.subplots_adjust(wspace=space / inner)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the prefix that all share, cut in front where they are too long to stand beside a plot."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 2 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [_cut(part[shared:]) for part in parts]


def _cut(parts: Sequence[str]) -> str:
    """A dotted name that fits beside a plot; the end stays, because it tells layers apart."""
    name = ".".join(parts)
    if len(name) <= TEXT_LIMIT:
        return name
    return f"…{_cut(parts[1:]).lstrip('…')}" if len(parts) > 1 else f"…{name[1 - TEXT_LIMIT :]}"


def row_labels(names: Sequence[str], height: float) -> tuple[list[int], list[str]]:
    """Labelled rows and their labels: every layer, or where rows are too low (inches) for that, each block's first."""
    if height >= LABEL_HEIGHT:
        return list(range(len(names))), short_names(names)
    places: list[int] = []
    starts = [start for start, _, name in blocks(names) if name]
    for start in starts or range(len(names)):
        if not places or (start - places[-1]) * height >= LABEL_HEIGHT:
            places.append(start)
    return places, short_names([block(names[place]) or names[place] for place in places])


def label_margin(labels: Sequence[str]) -> float:
    """Inches that the longest of these tick labels needs."""
    return 0.25 + CHARACTER * max(map(len, labels), default=0)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per name in order of first appearance; beyond the palette the rarest names share its grey."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) > len(PALETTE):
        common = sorted(distinct, key=lambda name: (-names.count(name), distinct.index(name)))[: len(PALETTE) - 1]
        distinct = [name for name in distinct if name in common]
    palette = dict(zip(distinct, PALETTE, strict=False))
    return {name: palette.get(name, PALETTE[-1]) for name in dict.fromkeys(names)}


def role_colours(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A colour per layer by its role, and the legend; beyond the palette the rarest roles are `other`."""
    roles = [role(name) for name in names]
    usual = max(roles, key=roles.count, default="")
    if roles.count(usual) > USUAL * len(roles):  # as `convolution` in every layer: the part before it tells more
        roles = [
            role(name.rpartition(".")[0]) or own if own == usual else own
            for own, name in zip(roles, names, strict=True)
        ]
    palette = colours(roles)
    crowded = len(palette) > len(PALETTE)
    legend = {"other" if crowded and shade == PALETTE[-1] else name: shade for name, shade in palette.items()}
    return [palette[name] for name in roles], legend


def blocks(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Runs of layers of one block in execution order, as (first, after last, block)."""
    runs: list[tuple[int, int, str]] = []
    for index, name in enumerate(names):
        if runs and runs[-1][2] == block(name):
            runs[-1] = (runs[-1][0], index + 1, runs[-1][2])
        else:
            runs.append((index, index + 1, block(name)))
    return runs


def shade_blocks(ax: Axes, names: Sequence[str], rows: bool) -> None:
    """A faint band behind every other block, along the rows or the columns of a plot, so that eyes keep their place."""
    for start, stop, _ in blocks(names)[::2]:
        band = ax.axhspan if rows else ax.axvspan
        band(start - 0.5, stop - 0.5, color=GRID, alpha=0.3, linewidth=0, zorder=0)


def block_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Label the columns of a plot by block number, as many as fit."""
    runs = [(start, stop, name.rsplit(".", 1)[-1]) for start, stop, name in blocks(names) if name]
    step = 1 + len(runs) // 40
    ax.set_xticks([(start + stop - 1) / 2 for start, stop, _ in runs[::step]], [name for *_, name in runs[::step]])
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_xlabel("block, layers in execution order" if runs else "layers in execution order")


def log_axis(ax: Axes, axis: str, values: Sequence[float], pad: float = 1.6) -> float:
    """Make `axis` logarithmic around the positive `values`, with plain labels; return its lower end."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / pad, max(positive) * pad
    scale, limit, ticks = (
        (ax.set_xscale, ax.set_xlim, ax.xaxis) if axis == "x" else (ax.set_yscale, ax.set_ylim, ax.yaxis)
    )
    scale("log")
    limit(low, high)
    steps = (1, 2, 5) if high / low < 60 else (1, 3) if high / low < 3000 else (1,)
    ticks.set_major_locator(LogLocator(10, subs=steps, numticks=8))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_locator(NullLocator())
    ticks.set_minor_formatter(NullFormatter())
    ax.grid(axis="x" if axis == "x" else "y")
    return low


def line(ax: Axes, points: Sequence[tuple[int, float]], index: int, label: str) -> None:
    """A series with the look number `index`; values a log axis cannot show (zero) leave a gap."""
    values = [(x, y if y > 0 else float("nan")) for x, y in points]
    handle = mark(index, label)
    ax.plot(
        [x for x, _ in values],
        [y for _, y in values],
        color=handle.get_color(),
        linestyle=handle.get_linestyle(),
        marker=handle.get_marker(),
        markersize=3.5 if len(points) <= CROWD else 2.2,
        linewidth=1.2 if len(points) <= CROWD else 0.9,
    )


def mark(index: int, label: str) -> Line2D:
    """The legend entry of series number `index`: colour and marker, and beyond the palette another dash."""
    turn, shade = divmod(index, len(PALETTE))
    dash = LINES[turn % len(LINES)]
    return Line2D(
        [], [], color=PALETTE[shade], marker=MARKERS[shade], markersize=4, linewidth=1.2, linestyle=dash, label=label
    )


def legend(ax: Axes, handles: Sequence[Artist], columns: int = 8) -> None:
    """A legend above the plot, where it covers no data."""
    if handles:
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderpad=0.4)
