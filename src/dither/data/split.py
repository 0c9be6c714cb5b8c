"""One data set used for two things: the part to calibrate on, and the part to judge by, with nothing in both."""

from dataclasses import replace

from dither.data.images import ImageSet
from dither.data.text import BETWEEN, LONG_LINE, TextSet
from dither.errors import InputError

JUDGED = 0.2  # the share of a text that is judged by: its end


def split_pictures(pictures: ImageSet, count: int, seed: int) -> ImageSet:
    """The pictures that no draw of up to `count` by `seed` holds, nor a copy of one that it holds.

    Raises:
        InputError: none is left.
    """
    if count >= len(pictures):
        raise InputError(
            f"{pictures.source!r} holds {len(pictures)} pictures: calibrating on {count} leaves none to judge by; "
            "give more, or another set with --data"
        )
    order = pictures.sample(len(pictures), seed)
    drawn = order.first(count).digests()
    labels = order.labels or (None,) * len(order)
    rest = [
        (picture, label)
        for picture, label in zip(order.pictures[count:], labels[count:], strict=True)
        if not replace(order, pictures=(picture,), labels=None).digests() & drawn
    ]
    if not rest:
        raise InputError(f"{pictures.source!r} holds only copies of the pictures to calibrate on; give --data")
    known = None if order.labels is None else tuple(label for _, label in rest if label is not None)
    return replace(order, pictures=tuple(picture for picture, _ in rest), labels=known)


def split_text(text: TextSet) -> tuple[TextSet, TextSet]:
    """The text without its last fifth, and that fifth without the long lines that it shares with the rest.

    Raises:
        InputError: there are too few lines.
    """
    lines = BETWEEN.join(text.documents).splitlines(keepends=True)
    sizes, wanted = 0, (1 - JUDGED) * sum(map(len, lines))
    for cut, line in enumerate(lines):  # noqa: B007  # the first line behind the wanted share
        if sizes >= wanted:
            break
        sizes += len(line)
    seen = {line.strip() for line in lines[:cut]}
    rest = [line for line in lines[cut:] if len(line.strip()) < LONG_LINE or line.strip() not in seen]
    if not lines[:cut] or not "".join(rest).strip():
        raise InputError(
            f"{text.source!r} has too few lines to calibrate on some and judge by others; give --calibration and --data"
        )
    return replace(text, documents=("".join(lines[:cut]),)), replace(text, documents=("".join(rest),))
