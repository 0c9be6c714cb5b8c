"""Tables for the width there is: long texts get short names, minor columns step back, names stay in one piece."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

LONG, NAMED = 14, 6  # from this length on a repeated text gets a short name; names that a reader keeps in mind
_NAME_SHARE = 0.4  # of the width is what the first column gets at least, if it needs it
_GAP = 2  # characters between columns
_SENTENCE = 24  # characters a line below which sentences become hard to read


def layout(
    rows: Sequence[Mapping[str, str]], width: int, title: str, numbers: Sequence[str], less: Sequence[str]
) -> tuple[Table, list[str]]:
    """A table of rows of the same columns, and what is to be said below it."""
    shown, caption = _folded(rows)
    shown, dropped = _fitted(shown, width, less)
    if dropped:
        caption.append(f"(a wider terminal or --json also shows {', '.join(dropped)})")
    heading = Text(title, style="bold") if title else None
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), title=heading)
    table.title_justify = "left"
    for name, cells in zip(shown[0], _widths(shown, width), strict=True):
        justify: Literal["left", "right"] = "right" if name in numbers else "left"
        table.add_column(Text(name), justify=justify, overflow="fold", width=cells)
    for row in shown:
        table.add_row(*(Text(cell) for cell in row.values()))
    return table, caption


def _lengths(rows: Sequence[Mapping[str, str]]) -> list[int]:
    return [max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]]


def _widths(rows: Sequence[Mapping[str, str]], width: int) -> list[int]:
    """Characters for each column: what it needs, as far as the long ones can give way."""
    widths = _lengths(rows)
    least = [_floor(number, longest, width) for number, longest in enumerate(widths)]
    while sum(widths) + _GAP * (len(widths) - 1) > width and widths != least:
        widest = max((n for n in range(len(widths)) if widths[n] > least[n]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _floor(number: int, longest: int, width: int) -> int:
    if number == 0:
        return min(longest, int(_NAME_SHARE * width))
    return longest if longest < LONG else min(longest, _SENTENCE)


def _fitted(
    rows: Sequence[Mapping[str, str]], width: int, less: Sequence[str]
) -> tuple[list[dict[str, str]], list[str]]:
    """Rows without as many of the columns in `less` as the width asks for, and those columns."""
    shown, dropped = [dict(row) for row in rows], []
    for name in less:
        floors = [_floor(number, longest, width) for number, longest in enumerate(_lengths(shown))]
        if sum(floors) + _GAP * (len(floors) - 1) <= width:
            break
        if name in shown[0]:
            dropped.append(name)
            shown = [{key: cell for key, cell in row.items() if key != name} for row in shown]
    return shown, dropped


def _folded(rows: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """Long texts that a column repeats become short names, explained below; what all rows say leaves the table."""
    shown, said = [dict(row) for row in rows], []
    for name in list(shown[0])[1:]:
        texts = list(dict.fromkeys(row[name] for row in shown))
        if max(map(len, texts)) < LONG or len(texts) > min(NAMED, len(shown) / 2):
            continue
        if len(texts) == 1:
            said.append(f"{name}: {texts[0]}")
            shown = [{key: cell for key, cell in row.items() if key != name} for row in shown]
            continue
        short = _short_names(texts)
        said += [f"{short[text]} = {text}" for text in texts if short[text] != text]
        shown = [{**row, name: short[row[name]]} for row in shown]
    return shown, list(dict.fromkeys(said))


def _short_names(texts: Sequence[str]) -> dict[str, str]:
    """Formats by the part before the first colon, with a letter where that is not enough; short texts as they are."""
    heads = {text: text.partition(":")[0] for text in texts if len(text) >= LONG}
    times, letters = Counter(heads.values()), iter("abcdefghij")
    long = {text: head if times[head] == 1 else f"{head}.{next(letters)}" for text, head in heads.items()}
    return {text: long.get(text, text) for text in texts}
