"""One set as two: what is calibrated on and what judges have nothing in common."""

from dataclasses import replace
from pathlib import Path

import pytest

from dither.data import TextSet, open_images
from dither.data.split import split_pictures, split_text
from dither.errors import InputError


def test_no_draw_that_calibrates_holds_a_picture_that_judges(demo_calibration_folder: Path) -> None:
    pictures = open_images(demo_calibration_folder)
    rest = split_pictures(pictures, 20, seed=3)
    assert len(rest) == 12
    assert rest.labels is not None
    assert len(rest.labels) == 12
    for count in (1, 7, 20):
        assert not pictures.sample(count, 3).digests() & rest.digests()
    names = dict(zip((p.name for p in pictures.pictures), pictures.labels or (), strict=True))
    assert [names[picture.name] for picture in rest.pictures] == list(rest.labels)


def test_copies_of_pictures_that_calibrate_do_not_judge(demo_calibration_folder: Path) -> None:
    pictures = open_images(demo_calibration_folder).first(4)
    twice = replace(pictures, pictures=pictures.pictures * 2, labels=None)
    rest = split_pictures(twice, 4, seed=0)
    assert rest.labels is None
    assert not twice.sample(4, 0).digests() & rest.digests()
    same = replace(pictures, pictures=pictures.pictures[:1] * 5, labels=None)
    with pytest.raises(InputError, match="only copies"):
        split_pictures(same, 2, seed=0)
    with pytest.raises(InputError, match="leaves none to judge by"):
        split_pictures(pictures, 4, seed=0)


def test_the_end_of_a_text_judges_without_the_lines_it_shares() -> None:
    lines = [
        f"line {number} is as long as a line that two texts do not share by chance, in words\n" for number in range(50)
    ]
    text = TextSet(("".join(lines[:25]), "".join([*lines[25:48], lines[0], lines[49]])), "t.txt")
    first, last = split_text(text)
    assert not first.digests() & last.digests()
    assert last.documents[0].endswith(lines[49])
    assert lines[0] not in last.documents[0]
    assert 0.75 < len(first.documents[0]) / sum(map(len, text.documents)) < 0.85
    with pytest.raises(InputError, match="too few lines"):
        split_text(TextSet(("one line\n",), "t.txt"))
