"""The options that several commands share, each described once."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

_COMMON = "For every command"

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON and nothing else.", rich_help_panel=_COMMON)
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, …; by default a GPU if there is one.", show_default=False,
                 rich_help_panel=_COMMON),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Decides what is drawn.", min=0, rich_help_panel=_COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes.", rich_help_panel=_COMMON)]
Debug = Annotated[
    bool, typer.Option("--debug", help="Log every layer; show the traceback of an error.", rich_help_panel=_COMMON)
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a transformers or timm model.", show_default=False)
]
Calibration = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="What to calibrate on. Pictures: a folder, .npz or .csv; text: .txt or .jsonl.",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Pictures (32) or sequences of text (128) to calibrate on.",
                 show_default=False),
]  # fmt: skip
Count = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Pictures or windows of text to evaluate on (default: all).", show_default=False
    ),
]
Length = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Tokens of a calibration sequence (default: 512).", show_default=False),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Samples at a time; fewer take less memory.")]
Workers = Annotated[
    int, typer.Option(min=1, metavar="N", help="Processes that solve or probe layers at the same time.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine", metavar="NAME",
        help="Where layers are solved or probed: local, torchrun (by itself under torchrun) or ray.",
    ),
]  # fmt: skip
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="A Ray cluster, `auto` for this machine's (default: N workers here).",
                 show_default=False),
]  # fmt: skip
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]


def check_new(files: Sequence[Path], *, force: bool) -> None:
    """Refuse to write over files, before any work is done.

    Raises:
        InputError: one is there and `force` was not asked for, or is a folder.
    """
    from dither.errors import InputError

    for path in files:
        if path.is_dir():
            raise InputError(f"output {str(path)!r} is a folder; choose a file")
        if path.exists() and not force:
            raise InputError(f"output {str(path)!r} is there already; choose another name, or replace it with --force")


def scores_beside(output: str | None) -> str | None:
    """The folder of score tables that goes with an output file."""
    return None if output is None else str(Path(output).with_suffix(".scores"))


@contextmanager
def going_on(scores: str | None) -> Iterator[None]:
    """Let an interrupted measurement say where its finished parts are, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if scores is not None and any(Path(scores).glob("*/parts/*")):
            stop.add_note(f"finished parts are kept in {scores!r}: repeat the command to go on")
        raise


def chosen_device(text: str | None) -> str | None:
    """The device that the user named, checked to exist.

    Raises:
        InputError: there is no such device.
    """
    if text is None:
        return None
    import torch

    from dither.errors import InputError

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {text!r} cannot be used: {reason}; try cpu") from None
    return str(device)


def listed(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_bytes(text: str) -> float:
    """Bytes of a size such as `3.2GB`, `20 MB`, `512KiB` or a plain number.

    Raises:
        InputError: it is none.
    """
    from dither.errors import InputError

    matched = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    try:
        number = float(matched[1]) if matched else float("nan")
    except ValueError:
        number = float("nan")
    if matched is None or not number > 0:
        raise InputError(f"expected a size such as 3.2GB or 20MB, got {text!r}")
    power = " kmgt".index(matched[2].lower() or " ")
    return float(number * (1024 if matched[3] else 1000) ** power)
