"""The journal of a search: `trials.jsonl`, a header and then a line for each trial, written the moment it is known.

The header holds what decides a run (`fingerprint`) and what another run needs to learn from it (`model`, `features`,
`reference`, `objective`). A last line that a kill cut short is dropped.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dither.errors import InputError, PathError, ResumeError, StorageError

FILE = "trials.jsonl"
SCHEMA = 1


class Journal:
    """An open journal; `records` are the trials that it holds, by number."""

    def __init__(self, path: Path, header: Mapping[str, Any], resume: bool) -> None:
        """Start a journal, or go on with the one that is there.

        Raises:
            InputError: there is one and `resume` was not asked for.
            ResumeError: the one that is there is of another run; the message says what differs.
            StorageError: it cannot be written.
        """
        self.path = path
        self.records: dict[int, dict[str, Any]] = {}
        header = json.loads(json.dumps({"schema": SCHEMA, "kind": "tune", **header}))
        if not path.exists():
            self._write(json.dumps(header) + "\n", "x")
            return
        if not resume:
            raise InputError(
                f"{str(path.parent)!r} holds the trials of a search already; pass --resume to go on, or remove it"
            )
        found, records, whole = _read(path)
        if not found:  # killed while it wrote its first line
            path.unlink()
            self._write(json.dumps(header) + "\n", "x")
            return
        _same(found, header, path)
        if whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)
        self.records = records

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a trial; it is on the disk when this returns."""
        self.records[int(record["number"])] = dict(record)
        self._write(json.dumps(record, allow_nan=False) + "\n", "a")

    def _write(self, text: str, mode: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {str(self.path)!r}: {error}") from error


def read_journal(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and trials of a journal, or of the one in a folder, in the order of their numbers.

    Raises:
        PathError: there is none.
        InputError: it is no journal, or holds no trial.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise PathError(f"expected the trials of an earlier search at {str(file)!r}, found none; give OUT/{FILE}")
    header, records, _ = _read(file)
    if header.get("kind") != "tune" or header.get("schema") != SCHEMA:
        raise InputError(f"{str(file)!r} is no {FILE} of this version of dither")
    if not records:
        raise InputError(f"{str(file)!r} holds no finished trial")
    return header, [records[number] for number in sorted(records)]


def _read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """The header, the trials by number, and how many bytes of the file are whole lines."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error}") from error
    whole = content.rfind(b"\n") + 1
    header: dict[str, Any] = {}
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(content[:whole].splitlines()):
        try:
            data = json.loads(line)
            if number == 0:
                header = dict(data)
            else:
                records[int(data["number"])] = dict(data)
        except (ValueError, KeyError, TypeError):
            raise ResumeError(
                f"line {number + 1} of {str(path)!r} is damaged; remove the file and start again"
            ) from None
    return header, records, whole


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    old, new = found.get("fingerprint", {}), wanted.get("fingerprint", {})
    differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if found.get("schema") != wanted["schema"]:
        differing = ["version of dither"]
    if differing:
        raise ResumeError(
            f"the search in {str(path.parent)!r} had another {', '.join(differing)}; "
            "repeat its command, or choose another output"
        )
