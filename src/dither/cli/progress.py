"""How far a long work is: a bar in a terminal, a line now and then in a log, or nothing."""

from collections.abc import Callable
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

EVERY_S = 15.0  # seconds between two lines in a log


class Silent:
    """Shows nothing."""

    def __call__(self, what: str, done: int | float, of: int) -> None:
        """Nothing."""


class Sparse:
    """A line at most every few seconds; short works say nothing."""

    def __init__(self, say: Callable[[str], None], title: str) -> None:
        self.say, self.title, self.last = say, title, monotonic()

    def __call__(self, what: str, done: int | float, of: int) -> None:
        """Say it if it is time."""
        if monotonic() - self.last >= EVERY_S:
            self.last = monotonic()
            self.say(f"{self.title}: {int(done)} of {of}, {what}")


class Bar:
    """A bar with the time that is left; it goes away when the work is done."""

    def __init__(self, console: Console, title: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("left"), Remaining(), console=console, transient=True)
        self.title, self.of = title, -1
        self.done: int | float = 0
        self.task: TaskID | None = None

    def __enter__(self) -> "Bar":
        self.progress.start()
        self.task = self.progress.add_task(f"{self.title}: reading", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, what: str, done: int | float, of: int) -> None:
        """Move on; another total, or a count that starts again, is a new phase with its own pace."""
        if self.task is None or of != self.of or done < self.done:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task(what, total=of)
        self.of, self.done = of, done
        self.progress.update(self.task, description=_short(f"{self.title}: {what}"), completed=done)


def _short(text: str, width: int = 34) -> str:
    return text if len(text) <= width else f"{text[:10]}…{text[11 - width :]}"
