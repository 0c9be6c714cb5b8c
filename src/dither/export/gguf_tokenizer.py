"""The tokenizer inside a GGUF file: tokens, kinds, merges or scores, and the special ones."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.errors import InputError
from dither.export.source import Source

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPLITS = (  # what a pre-tokenizer's pattern holds, and llama.cpp's name for it
    (r"\p{N}{1,3}", "llama-bpe"),
    (r"|\p{N}|", "qwen2"),
)


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer; `scores` or `merges`, as its `model` asks."""

    model: str
    pre: str | None
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    adds_bos: bool
    chat_template: str | None
    notes: list[str]


def read_vocabulary(source: Source) -> Vocabulary:
    """The vocabulary of the network's tokenizer.json, filled up to the size of its embeddings.

    Raises:
        InputError: there is none, or it is of a kind that has no place in the format.
    """
    folder = next((folder for folder in source.folders if (folder / "tokenizer.json").is_file()), None)
    if folder is None:
        raise InputError(f"{source.name} has no tokenizer.json, which a GGUF file takes in; put it beside the model")
    data = _json(folder / "tokenizer.json")
    model = data["model"]
    if model.get("type") != "BPE":
        raise InputError(f"a GGUF file takes in byte-pair tokenizers, got {model.get('type')}; export --to dequantized")
    tokens, kinds = _tokens(data, int(source.config["vocab_size"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    pre = None if pieces else _pre_tokenizer(data.get("pre_tokenizer"))
    return Vocabulary(
        "llama" if pieces else "gpt2", pre, tokens, _byte_kinds(tokens, kinds) if pieces else kinds,
        [] if pieces else merges, _scores(tokens, merges) if pieces else [], _special(source, folder, data),
        _adds_bos(data), _chat_template(folder),
        ["its pre-tokenizer has no name in GGUF: llama.cpp may cut some texts otherwise"] if pre == "default" else [],
    )  # fmt: skip


def _tokens(data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens by their numbers with a kind each; numbers that nothing has are unused."""
    added = {entry["id"]: entry for entry in data.get("added_tokens", ())}
    names = {number: word for word, number in data["model"]["vocab"].items()}
    names |= {number: entry["content"] for number, entry in added.items()}
    unknown = data["model"].get("unk_token")
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = []
    for number, token in enumerate(tokens):
        if number not in names:
            kinds.append(UNUSED)
        elif token == unknown:
            kinds.append(UNKNOWN)
        elif number in added:
            kinds.append(CONTROL if added[number].get("special") else USER_DEFINED)
        else:
            kinds.append(NORMAL)
    return tokens, kinds


def _byte_kinds(tokens: list[str], kinds: list[int]) -> list[int]:
    """Kinds with those of bytes (`<0x0A>`) marked, which a tokenizer of pieces falls back to."""
    return [BYTE if len(t) == 6 and t.startswith("<0x") else kind for t, kind in zip(tokens, kinds, strict=True)]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores that merge in the order of the merges; only their order matters."""
    rank = {merge.replace(" ", ""): number for number, merge in reversed(list(enumerate(merges)))}
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(entry: Mapping[str, Any] | None) -> str:
    """llama.cpp's name for how text is cut before merging."""
    steps = list((entry or {}).get("pretokenizers", [entry] if entry else []))
    patterns = "".join(step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split")
    for part, name in _SPLITS:
        if part in patterns:
            return name
    kinds = [step["type"] for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    return "gpt-2" if kinds == ["ByteLevel"] else "default"


def _special(source: Source, folder: Path, data: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of the special tokens that are known, by GGUF's short names."""
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    numbers = dict(data["model"]["vocab"]) | {entry["content"]: entry["id"] for entry in data.get("added_tokens", ())}
    found = {}
    for short in ("bos", "eos", "unk", "pad"):
        word = settings.get(f"{short}_token")
        word = word["content"] if isinstance(word, Mapping) else word
        number = numbers.get(word, source.config.get(f"{short}_token_id"))
        number = number[0] if isinstance(number, list) else number
        if isinstance(number, int):
            found[short] = number
    return found


def _adds_bos(data: Mapping[str, Any]) -> bool:
    """Whether the tokenizer's template begins a text with a special token."""
    post = data.get("post_processor") or {}
    steps = post.get("processors", [post])
    return any("SpecialToken" in (step.get("single") or [{}])[0] for step in steps)


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from None
