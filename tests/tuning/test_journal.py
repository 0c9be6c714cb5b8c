"""The journal keeps every whole line, and knows its own search from another."""

from pathlib import Path

import pytest

from dither.errors import InputError, PathError, ResumeError
from dither.tuning.journal import FILE, Journal, read_journal

HEADER = {"fingerprint": {"model": "a", "seed": 0}, "features": {"depth": 2.0}}


def started(folder: Path, **changes: object) -> Journal:
    return Journal(folder / FILE, {**HEADER, "fingerprint": {**HEADER["fingerprint"], **changes}}, resume=True)


def test_trials_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    journal = started(tmp_path / "new")
    for number in (1, 0):
        journal.append({"number": number, "figures": {"top1": 0.5}})
    again = started(tmp_path / "new")
    assert again.records == {1: {"number": 1, "figures": {"top1": 0.5}}, 0: {"number": 0, "figures": {"top1": 0.5}}}
    header, records = read_journal(tmp_path / "new")
    assert header["features"] == {"depth": 2.0}
    assert [record["number"] for record in records] == [0, 1]


@pytest.mark.parametrize("torn", ['{"number": 1, "fig', '{"number": 1}'])
def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, torn: str) -> None:
    started(tmp_path).append({"number": 0})
    with (tmp_path / FILE).open("a") as file:
        file.write(torn)  # without its end of line
    journal = started(tmp_path)
    assert set(journal.records) == {0}
    journal.append({"number": 1, "whole": True})
    assert started(tmp_path).records[1] == {"number": 1, "whole": True}


def test_a_kill_before_the_first_whole_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"schema": 1, "ki')
    assert started(tmp_path).records == {}
    assert (tmp_path / FILE).read_text().endswith("\n")


def test_trials_of_another_search_are_not_mixed_in(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(ResumeError, match="had another model; repeat its command"):
        started(tmp_path, model="b")
    with pytest.raises(InputError, match="pass --resume"):
        Journal(tmp_path / FILE, HEADER, resume=False)


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    started(tmp_path).append({"number": 0})
    with (tmp_path / FILE).open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(ResumeError, match=r"line 3 of .* is damaged"):
        started(tmp_path)


def test_what_is_no_journal_cannot_be_learned_from(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="found none"):
        read_journal(tmp_path)
    started(tmp_path)
    with pytest.raises(InputError, match="no finished trial"):
        read_journal(tmp_path / FILE)
    (tmp_path / "other.jsonl").write_text('{"text": "hello"}\n{"number": 1}\n')
    with pytest.raises(InputError, match=r"is no trials\.jsonl"):
        read_journal(tmp_path / "other.jsonl")
