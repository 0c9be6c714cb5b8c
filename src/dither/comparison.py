"""compare: several methods on one model, several calibration draws each, one table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dither.data import DataSet, TextSet, open_data
from dither.data.split import split_text
from dither.distilled import DISTILLED
from dither.errors import DitherError, InputError
from dither.evaluation.exam import BATCH, PictureExam, TextExam, open_exam, refuse_overlap
from dither.methods.base import Method
from dither.models.network import Network, open_network
from dither.pipeline import quantize
from dither.recipe import parse_method
from dither.result import Report, Result

Progress = Callable[[str, int | float, int], None]  # (run and unit, runs done with the part of this one, runs in all)
_QUANTIZING = 0.8  # measured: the part of a run that is not evaluation, for a small model


def compare(
    model: str | Path | nn.Module,
    methods: Sequence[str | Method],
    calibration: str | Path | DataSet | None,
    data: str | Path | DataSet,
    *,
    weights: Sequence[str] = (),
    activations: Sequence[str] = (),
    seeds: int = 1,
    seed: int = 0,
    count: int | None = None,
    evaluate_count: int | None = None,
    length: int | None = None,
    batch_size: int = BATCH,
    device: str | torch.device | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    finished: Callable[[str, int, Result], None] | None = None,
) -> Report:
    """Quantize the model with every method, format and seed from `seed` on, and evaluate each result on `data`.

    A method is a name, a text such as `gptq+reparameterize=true`, or a configured Method, for which `weights` and
    `activations` are not applied. A run that fails is reported as a failure; the others go on. `finished` gets the
    label, seed and result of every run that did not fail. Without `calibration` a text is cut: its first four fifths
    calibrate, its end judges.

    Raises:
        InputError: calibration and evaluation data overlap, or a method or format is unknown.
    """
    jobs = _jobs(methods, weights, activations)
    bench = open_bench(model, calibration, data, evaluate_count, batch_size, device)
    return run_jobs(
        bench, jobs, range(seed, seed + seeds), count=count, length=length, workers=workers, progress=progress,
        finished=finished,
    )  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A full-precision network, what it is calibrated on, and its own answers to what it is judged by."""

    network: Network
    source: DataSet | str
    exam: PictureExam | TextExam


@runtime_checkable
class Known(Protocol):
    """Runs that were made before, by label and seed, and where new ones are written at once."""

    def find(self, label: str, seed: int) -> dict[str, Any] | None:
        """A run's row, if it is known."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""


def open_bench(
    model: str | Path | nn.Module,
    calibration: str | Path | DataSet | None,
    data: str | Path | DataSet,
    evaluate_count: int | None,
    batch_size: int,
    device: str | torch.device | None,
) -> Bench:
    """Read network and data, and let the network answer.

    Raises:
        InputError: calibration and evaluation data overlap, or pictures without calibration data.
    """
    network = open_network(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source, questions = _parts(calibration, _open(data))
    if not isinstance(source, str):
        refuse_overlap(source, questions)
    return Bench(network, source, open_exam(network, questions, evaluate_count, 0, batch_size).answered_by(network))


def _parts(calibration: str | Path | DataSet | None, data: DataSet) -> tuple[DataSet | str, DataSet]:
    """What calibrates and what judges."""
    if calibration is None:
        if not isinstance(data, TextSet):
            raise InputError("pictures are not cut in two: give calibration data (--calibration) that do not judge")
        return split_text(data)
    return (DISTILLED if calibration == DISTILLED else _open(calibration)), data


def run_jobs(
    bench: Bench,
    jobs: Sequence[tuple[str, Method]],
    draws: range,
    *,
    count: int | None = None,
    length: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    finished: Callable[[str, int, Result], None] | None = None,
    known: Known | None = None,
) -> Report:
    """Every labelled method with every draw, judged, as a report of kind `compare`; `known` runs are not repeated."""
    network, exam = bench.network, bench.exam
    runs: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    total = len(jobs) * len(draws)
    for done, (draw, (label, method)) in enumerate((draw, job) for draw in draws for job in jobs):
        if known is not None and (row := known.find(label, draw)) is not None:
            runs.append(row)
            facts = facts or {**row["provenance"], "seed": _span(draws)}
            continue
        within = _within(progress, f"{label} seed {draw}", done, total)
        try:
            drawn = bench.source if method.without_data() is None else None  # without data means without data here too
            result = quantize(
                network.model, method, drawn, count=count, seed=draw, length=length, workers=workers, progress=within
            )
            found = exam.mark(result.network)
        except (DitherError, RuntimeError) as error:  # RuntimeError: torch is out of memory, or a factorization failed
            failures.append({"method": label, "seed": draw, "error": str(error)})
            continue
        facts = facts or {**result.report.data["provenance"], "seed": _span(draws)}
        runs.append(_run(label, method, draw, result.report.data, found.to_json()))
        if known is not None:
            known.add(runs[-1] | {"provenance": result.report.data["provenance"]})
        if finished is not None:
            finished(label, draw, result)
    if progress is not None:
        progress("done", total, total)
    evaluation = {"count": exam.count, "source": exam.source}
    return Report(
        {
            "schema": 1,
            "kind": "compare",
            **_model_facts(network, exam.facts()),
            "provenance": facts,
            "runs": runs,
            "failures": failures,
            "evaluation": evaluation,
        }
    )


def _model_facts(network: Network, quality: dict[str, float | None]) -> dict[str, Any]:
    parameters, size = sum(p.numel() for p in network.model.parameters()), network.stored_bytes
    return {
        "model": {
            "name": network.name,
            "class": type(network.model).__name__,
            "parameters": parameters,
            "source": network.name,
        },
        "reference": {
            "top1": None,
            **quality,
            "size_bytes": size,
            "bits_per_weight": 8 * size / parameters,
        },
    }


def _jobs(
    methods: Sequence[str | Method], weights: Sequence[str], activations: Sequence[str]
) -> list[tuple[str, Method]]:
    jobs: list[tuple[str, Method]] = []
    for method in methods:
        if isinstance(method, Method):
            same = sum(label.partition(" #")[0] == method.name for label, _ in jobs)
            jobs.append((f"{method.name} #{same + 1}" if same else method.name, method))
            continue
        for weight in weights or (None,):
            for activation in activations or (None,):
                given = {"weights": weight, "activations": activation}
                fields = {key: text for key, text in given.items() if text is not None}
                jobs.append((method, parse_method(method, fields)))
    if not jobs:
        raise InputError("compare needs at least one method")
    return jobs


def _within(progress: Progress | None, run: str, done: int, total: int) -> Progress | None:
    """The progress of a run's units as a part of all runs; evaluating takes what is left of the run."""
    if progress is None:
        return None
    progress(run, done, total)

    def report(unit: str, units: int | float, of: int) -> None:
        progress(f"{run} {unit}", done + _QUANTIZING * units / of, total)

    return report


def _span(draws: range) -> str:
    return str(draws[0]) if len(draws) == 1 else f"{draws[0]} to {draws[-1]}"


def _open(data: str | Path | DataSet) -> DataSet:
    return open_data(data) if isinstance(data, str | Path) else data


def _run(label: str, method: Method, seed: int, report: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    totals = report["totals"]
    return {
        "method": method.name,
        "label": label,
        "seed": seed,
        "weights": str(method.weights),
        "activations": "none" if method.activations is None else str(method.activations),
        "bits_per_weight": totals["bits_per_weight"],
        "size_bytes": totals["size_bytes"],
        "top1": found["top1"],
        "agreement": found["agreement"],
        "kl": found["kl"],
        "sqnr_db": found["sqnr_db"],
        "perplexity": found["perplexity"],
        "time_s": totals["time_s"],
        "layers": [{"name": row["name"], "output_error": row["output_error"]} for row in report["layers"]],
    }
