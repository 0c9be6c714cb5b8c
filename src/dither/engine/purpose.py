"""The state of torch that statistics, solves and probes need, in whatever process they run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def full_floats() -> Iterator[None]:
    """No TF32, which GPUs use for convolutions unless told otherwise: what is compared would differ by its rounding."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def single_purpose() -> Iterator[None]:
    """No gradients, and no reduced precision in statistics and solves."""
    with full_floats(), torch.no_grad():
        yield


def precisely(function: Callable[[T], R], task: T) -> R:
    """function(task) in that state, which a worker does not have by itself."""
    with single_purpose():
        return function(task)
