"""Text sets: a `.txt`, a `.jsonl` (one object with `text` a line) or a folder of either, cut into windows of tokens.

Windows are of equal length, so that no padding is ever counted. For evaluation they follow one another without
overlap, as perplexity on WikiText is measured in the GPTQ paper's code; for calibration they are drawn by a seed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dither.errors import InputError, PathError

SUFFIXES = (".txt", ".jsonl")
LONG_LINE = 64  # characters from which a line is no heading that two texts may share
BETWEEN = "\n\n"  # joins documents


@dataclass(frozen=True)
class TextSet:
    """Documents in a fixed order; `source` is the last part of the path that was opened."""

    documents: tuple[str, ...]
    source: str

    def tokens(self, tokenizer: Any) -> Int[Tensor, " n"]:
        """All documents as one sequence of token ids, tokenized as one text with the tokenizer's own special tokens."""
        ids = tokenizer(BETWEEN.join(self.documents), verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def windows(self, tokenizer: Any, length: int, count: int | None = None) -> Int[Tensor, "w t"]:
        """The first `count` (all by default) windows of `length` tokens; what is left at the end is dropped.

        Raises:
            InputError: the text holds fewer.
        """
        chunks = self._chunks(self.tokens(tokenizer), length)
        if count is not None and count > len(chunks):
            raise InputError(f"{count} windows of {length} tokens were asked for, {self.source!r} holds {len(chunks)}")
        return chunks if count is None else chunks[:count]

    def sample(self, tokenizer: Any, length: int, count: int | None, seed: int, most: int) -> Int[Tensor, "w t"]:
        """`count` windows that do not overlap, drawn by `seed`; by default `most`, or all where there are fewer.

        Raises:
            InputError: the text holds fewer than `count`.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = self.tokens(tokenizer)
        spare = max(1, len(tokens) - length * (len(tokens) // length) + 1)
        start = int(torch.randint(spare, (1,), generator=generator))
        chunks = self._chunks(tokens[start:], length)
        if count is not None and count > len(chunks):
            raise InputError(
                f"calibration of {count} × {length} tokens was asked for, {self.source!r} holds {len(chunks)} windows; "
                "give more text, or fewer or shorter samples"
            )
        wanted = min(most, len(chunks)) if count is None else count
        return chunks[torch.randperm(len(chunks), generator=generator)[:wanted]]

    def _chunks(self, tokens: Int[Tensor, " n"], length: int) -> Int[Tensor, "w t"]:
        if length < 2:
            raise InputError(f"windows need at least 2 tokens, one to predict; got {length}")
        if len(tokens) < length:
            raise InputError(f"{self.source!r} holds {len(tokens)} tokens, one window needs {length}")
        return tokens[: len(tokens) // length * length].view(-1, length)

    def sha256(self) -> str:
        """The digest of all documents in their order."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()

    def digests(self) -> frozenset[str]:
        """The digest of each long line, to find text that two sets share."""
        lines = (line.strip() for document in self.documents for line in document.splitlines())
        return frozenset(hashlib.sha256(line.encode()).hexdigest() for line in lines if len(line) >= LONG_LINE)


def is_text(path: str | Path) -> bool:
    """Whether a path is text rather than pictures: by its suffix, or by the files of a folder."""
    place = Path(path)
    if place.is_dir():
        return any(file.suffix.lower() in SUFFIXES for file in place.iterdir() if file.is_file())
    return place.suffix.lower() in SUFFIXES


def open_text(path: str | Path) -> TextSet:
    """Read a text file or a folder of them, in the order of their names.

    Raises:
        PathError: there is nothing, or it cannot be read.
        InputError: no text in it, or a line of a `.jsonl` has no `text`.
    """
    place = Path(path)
    if not place.exists():
        raise PathError(f"text {str(path)!r} does not exist")
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in SUFFIXES) if place.is_dir() else [place]
    documents = tuple(text for file in files for text in _read(file) if text.strip())
    if not documents:
        raise InputError(f"{str(path)!r} holds no text; give a .txt, a .jsonl with a field 'text', or a folder of them")
    return TextSet(documents, place.resolve().name)


def _read(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise PathError(f"text {file.name!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise InputError(f"text {file.name!r} is not UTF-8; convert it") from None
    return [content] if file.suffix.lower() != ".jsonl" else _json_lines(content, file.name)


def _json_lines(content: str, name: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} of {name!r} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f"line {number} of {name!r} has no field 'text'")
        texts.append(row["text"])
    return texts
