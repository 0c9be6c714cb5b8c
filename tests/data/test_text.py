import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dither.data import ImageSet, TextSet, open_data, open_text
from dither.errors import InputError, PathError


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": [ord(letter) for letter in text]}


def letters(count: int) -> TextSet:
    return TextSet(("".join(chr(97 + i % 26) for i in range(count)),), "alphabet")


def test_windows_follow_one_another_and_the_tail_is_dropped() -> None:
    windows = letters(23).windows(Letters(), 5)
    assert windows.shape == (4, 5)
    assert windows.flatten().tolist() == letters(23).tokens(Letters())[:20].tolist()
    assert torch.equal(letters(23).windows(Letters(), 5, 2), windows[:2])


def test_calibration_windows_do_not_overlap_and_depend_on_the_seed_alone() -> None:
    text = TextSet(("".join(chr(i) for i in range(100, 1100)),), "all different")
    drawn = text.sample(Letters(), 7, 50, seed=3, most=128)
    assert drawn.shape == (50, 7)
    assert drawn.unique().numel() == 350
    assert torch.equal(drawn, text.sample(Letters(), 7, 50, seed=3, most=128))
    assert not torch.equal(drawn, text.sample(Letters(), 7, 50, seed=4, most=128))
    assert len(text.sample(Letters(), 7, None, seed=0, most=9)) == 9
    assert len(text.sample(Letters(), 100, None, seed=0, most=128)) in (9, 10)


def test_too_little_text_is_said_with_what_there_is() -> None:
    with pytest.raises(InputError, match="holds 10 tokens, one window needs 16"):
        letters(10).windows(Letters(), 16)
    with pytest.raises(InputError, match="3 windows of 4 tokens were asked for, 'alphabet' holds 2"):
        letters(10).windows(Letters(), 4, 3)
    with pytest.raises(InputError, match="give more text"):
        letters(10).sample(Letters(), 4, 3, seed=0, most=128)
    with pytest.raises(InputError, match="at least 2 tokens"):
        letters(10).windows(Letters(), 1)


def test_text_is_read_from_a_file_json_lines_or_a_folder_of_both(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "between"}\n')
    (tmp_path / "notes.md").write_text("not read")
    assert open_text(tmp_path).documents == ("first", "between", "second")
    assert open_text(tmp_path / "b.txt") == TextSet(("second",), "b.txt")
    assert isinstance(open_data(tmp_path), TextSet)


def test_a_folder_of_pictures_is_still_pictures(demo_calibration_folder: Path) -> None:
    assert isinstance(open_data(demo_calibration_folder), ImageSet)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b" \n", "holds no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2 of 'broken.jsonl' is not JSON"),
        ("other.jsonl", json.dumps({"content": "a"}).encode(), "line 1 of 'other.jsonl' has no field 'text'"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_text(tmp_path / name)


def test_a_missing_text_is_a_path_error(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        open_text(tmp_path / "nothing.txt")


def test_sets_that_share_a_long_line_share_a_digest_but_not_a_heading() -> None:
    line = "a sentence that is long enough not to be in two texts by chance, unlike a heading"
    one, two = TextSet((f"= Title =\n{line}\n",), "one"), TextSet((f"{line} more\n= Title =",), "two")
    assert one.digests() & one.digests()
    assert not one.digests() & two.digests()
    assert one.digests() & TextSet((f"other\n  {line}",), "three").digests()
