"""Engines of one machine: this process, or a pool of processes."""

import copy
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import multiprocessing

from dither.engine.held import held

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Engine(Protocol):
    """Runs independent tasks and gives their results in order."""

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """function(task) for each task, in order; the first error is raised."""
        ...


class InProcess:
    """Runs tasks one after the other, here."""

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """function(task) for each task, in order."""
        return map(function, tasks)


class ProcessPool:
    """Runs tasks in `workers` fresh processes of one thread each; functions and tasks must be picklable."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._numbers = count()
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_single_thread)

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """function(task) for each task, in order; all run at once as far as there are workers.

        Each worker has a copy of the function and all it holds, such as a model, of its own.
        """
        return self._pool.map(partial(_call, str(next(self._numbers)), function), tasks)

    def __enter__(self) -> "ProcessPool":
        with _deaf_to_interrupts():  # workers inherit this, even while they import
            for _ in range(self.workers):  # each starts one
                self._pool.submit(int)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; only the first one is to answer, and it ends the others."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _call(key: str, function: Callable[[T], R], task: T) -> R:
    """What a worker does: one task of a function, whose tensors arrive in memory that all processes share."""
    own: Callable[[T], R] = held(key, lambda: copy.deepcopy(function))
    return own(task)


def _single_thread() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def engine(workers: int) -> InProcess | ProcessPool:
    """The engine for a number of workers; 1 means this process."""
    return InProcess() if workers <= 1 else ProcessPool(workers)
