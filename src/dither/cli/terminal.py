"""What a command says: results on standard output, progress and notes on standard error, one line for an error."""

import json as json_text
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import ENOSPC, EPIPE
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from dither.cli.layout import layout
from dither.cli.progress import Bar, Silent, Sparse
from dither.errors import DitherError

ERROR, UNEXPECTED, INTERRUPTED = 1, 70, 130  # exit codes; 2 is typer's for a command line that is wrong
WIDE = 200  # columns of a table that goes to a file, where nothing needs to wrap
_TYPERS = (typer.Exit, typer.Abort, typer.BadParameter)


class Terminal:
    """A command runs `with` one; it turns every exception into one line on standard error and an exit code."""

    def __init__(self, *, json: bool, quiet: bool, debug: bool, rank: int | None = None) -> None:
        """`json` puts data in the place of tables; `quiet` leaves only results and errors; `debug` adds tracebacks.

        Of several ranks only that of number 0 says anything, but for errors. A command that gives no `rank` knows
        nothing of them, and does not run under torchrun.
        """
        self.rank = alone() if rank is None else rank
        self.json, self.quiet, self.debug = json, quiet or json or self.rank > 0, debug
        wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
        self.out = Console(file=sys.stdout, highlight=False, markup=False, width=wide)
        self.err = Console(file=sys.stderr, highlight=False, markup=False)
        self._warnings = warnings.catch_warnings()
        self._log: logging.Handler | None = None
        self._said = False

    def __enter__(self) -> "Terminal":
        self._warnings.__enter__()
        if self.debug:
            self._log, logger = logging.StreamHandler(sys.stderr), logging.getLogger("dither")
            logger.addHandler(self._log)
            logger.setLevel(logging.INFO)
        else:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            warnings.simplefilter("ignore")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._warnings.__exit__(None, None, None)
        if self._log is not None:
            logging.getLogger("dither").removeHandler(self._log)
        if error is None or isinstance(error, _TYPERS) or not isinstance(error, Exception | KeyboardInterrupt):
            return
        if isinstance(error, OSError) and error.errno in (EPIPE, ENOSPC):
            _give_up_output()
        if isinstance(error, BrokenPipeError):  # nobody reads on: stop without a word
            raise typer.Exit(ERROR) from None
        if self.debug:
            traceback.print_exception(error, file=sys.stderr)
        code, line = _explain(error)
        place = f"rank {self.rank}: " if self.rank else ""
        self.err.print(Text(place + " ".join(line.split())), soft_wrap=True)
        raise typer.Exit(code) from None

    def show(self, data: Mapping[str, Any]) -> None:
        """The result as JSON, if that was asked for."""
        if self.json and not self.rank:
            sys.stdout.write(json_text.dumps(_plain(data), indent=1, allow_nan=False) + "\n")
            sys.stdout.flush()

    def table(
        self, rows: Sequence[Mapping[str, str]], title: str = "", numbers: Sequence[str] = (), less: Sequence[str] = ()
    ) -> None:
        """Rows as a table that fits the terminal: the columns in `less` go first. Nothing with `--json`."""
        if self.json or self.rank or not rows:
            return
        table, caption = layout(rows, self.out.width, title, numbers, less)
        if self._said:
            self.out.print()
        self._said = True
        self.out.print(table)
        for text in caption:
            self.out.print(Text(text, style="dim"))

    def line(self, text: str = "") -> None:
        """A line of the result for people."""
        if not self.json and not self.rank:
            self._said = True
            self.out.print(Text(text), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line beside the result."""
        if not self.quiet:
            self.err.print(Text(text), soft_wrap=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[str, int | float, int], None]]:
        """A function (what, done, of) that shows how far a long work is."""
        if self.quiet:
            yield Silent()
        elif not sys.stderr.isatty():
            yield Sparse(self.note, title)
        else:
            with Bar(self.err, title) as bar:
                yield bar


def ranks() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process among the ranks that torchrun started."""
    return int(os.environ["RANK"]) if ranks() > 1 else 0


def alone() -> int:
    """Rank 0, the only one; under torchrun an error, of which rank 0 speaks."""
    if ranks() > 1:
        if rank() == 0:
            typer.echo("error: this command works in one process; start it without torchrun", err=True)
        raise typer.Exit(ERROR)
    return 0


def _give_up_output() -> None:
    """Send what is still buffered to nowhere, so that closing standard output does not fail again."""
    with suppress(OSError, ValueError):  # a test's standard output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and line of an exception; its notes follow in brackets."""
    notes = "; ".join(getattr(error, "__notes__", ()))
    after = f" ({notes})" if notes else ""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted{after}"
    if isinstance(error, DitherError):
        return ERROR, f"error: {error}{after}"
    if isinstance(error, OSError):  # the machine's fault, not the program's
        return ERROR, f"error: {error}{after}"
    kind = type(error).__name__
    if kind in ("MemoryError", "OutOfMemoryError"):
        return ERROR, f"error: out of memory; use fewer pictures (--samples, --count) or another --device{after}"
    return UNEXPECTED, f"error: unexpected {kind}: {error}{after}; run again with --debug to see where"


def _plain(value: Any) -> Any:
    """Data that strict JSON can hold: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
