"""Exam: the full-precision network's answers, kept while the network itself becomes a quantized one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dither.data import ImageSet
from dither.evaluation import Evaluation
from dither.evaluation.evaluate import evaluate, ids, logits, refuse_overlap, select
from dither.models.network import Network

Progress = Callable[[str, int, int], None]  # (what, pictures done, in all)


@dataclass(frozen=True)
class Exam:
    """Pictures, and what the full-precision network answers to them."""

    pictures: ImageSet
    reference: Float[Tensor, "n classes"]

    def mark(self, network: Network, progress: Progress | None = None) -> Evaluation:
        """How a quantized network answers in comparison."""
        counting = _counting(progress, "quantized", len(self.pictures))
        return evaluate(network, self.pictures, reference=self.reference, progress=counting)


def prepare_exam(
    network: Network, data: str | Path | ImageSet, count: int | None, calibration: Any, progress: Progress | None = None
) -> Exam:
    """Ask the full-precision network; whatever is wrong with the pictures is said here, before any other work.

    Raises:
        PathError, InputError: pictures or labels do not fit, or some were in the `calibration` too.
    """
    pictures = select(data, count)
    if isinstance(calibration, ImageSet):
        refuse_overlap(calibration, pictures)
    ids(network, pictures)
    return Exam(pictures, logits(network, pictures, progress=_counting(progress, "original", len(pictures))))


def _counting(progress: Progress | None, what: str, count: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    say = progress
    return lambda done: say(f"evaluating {what}", done, count)
