"""Bench: runs a trial of a search, that is, quantizes the model and asks the result the questions of the tuning data.

A bench can be sent to another process or machine, which opens the model there at the first trial.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import uuid4

from torch import nn

from dither.data import DataSet
from dither.errors import DitherError
from dither.evaluation.exam import BATCH, PictureExam, TextExam, open_exam
from dither.models.network import Network, open_network
from dither.pipeline import quantize
from dither.recipe import parse_method
from dither.tuning.trial import Outcome, Task

QUALITIES = ("top1", "agreement", "kl", "sqnr_db", "perplexity")
_OPENED: dict[str, tuple[Network, PictureExam | TextExam]] = {}


@dataclass
class Bench:
    """A model with data to calibrate on (`calibration`) and to judge by (`data`, or `count` of it)."""

    model: str | Path | nn.Module
    calibration: DataSet
    data: DataSet
    count: int | None = None
    length: int | None = None
    batch_size: int = BATCH
    device: str = "cpu"
    key: str = field(default_factory=lambda: uuid4().hex)  # names in a process what this bench, or a copy, opened there

    def open(self) -> tuple[Network, PictureExam | TextExam]:
        """The full-precision network and its answers; a process keeps those of the last bench that it worked for."""
        if self.key not in _OPENED:
            _OPENED.clear()
            network = open_network(self.model, self.device)
            if isinstance(self.model, nn.Module):  # the caller's, which stays as and where it is
                network.model = deepcopy(network.model).eval().to(self.device)
            exam = open_exam(network, self.data, self.count, 0, self.batch_size)
            _OPENED[self.key] = network, exam.answered_by(network)
        return _OPENED[self.key]

    def reference(self) -> dict[str, float | None]:
        """The figures of full precision."""
        network, exam = self.open()
        return {**exam.facts(), "kl": 0.0, "agreement": 1.0, "size_bytes": float(network.stored_bytes)}

    def run(self, task: Task) -> Outcome:
        """One trial; whatever ends it early is its error, so that the others go on."""
        network, exam = self.open()
        started = perf_counter()
        try:
            method = parse_method(task.method, task.fields)
            result = quantize(
                network.model, method, self.calibration, count=task.samples, seed=task.seed, length=self.length
            )
            found = exam.mark(result.network).to_json()
        except DitherError as error:
            return Outcome(task.number, error=str(error), time_s=perf_counter() - started)
        except Exception as error:  # a method's own fault, or the machine's memory: the next trial may well succeed
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return Outcome(task.number, error=reason, time_s=perf_counter() - started)
        figures = {name: _number(found, name) for name in QUALITIES}
        figures |= {name: _number(result.report.data["totals"], name) for name in ("bits_per_weight", "size_bytes")}
        return Outcome(task.number, figures, time_s=perf_counter() - started)


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else None
