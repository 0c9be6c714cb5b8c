"""quantize: read the model, walk it with a method, report, save."""

import copy
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dither.data import DataSet, open_data
from dither.data.calibration import LENGTH, Calibration, prepare_calibration
from dither.engine.local import InProcess, ProcessPool, engine
from dither.evaluation.exam import Exam, open_exam, refuse_overlap
from dither.methods.base import Method
from dither.models.anatomy import Anatomy, Unit, read_anatomy
from dither.models.coverage import coverage
from dither.models.network import Network, load_into, open_network
from dither.models.selection import matching, without
from dither.nn.linear import cache_weights
from dither.plan import SPILL_BUDGET, check_formats, make_plan
from dither.provenance import model_sha256, provenance
from dither.recipe import parse_method, resolved
from dither.result import Report, Result
from dither.unfinished import Unfinished, check_output
from dither.walk import Block, LayerRecord, walk

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # (what, units or pictures done, in all)


def quantize(
    model: str | Path | nn.Module,
    method: Method | str,
    calibration: Any,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    count: int | None = None,
    seed: int = 0,
    length: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    workers: int = 1,
    spill_budget: int = SPILL_BUDGET,
    evaluation: str | Path | DataSet | None = None,
    evaluate_count: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model; a module that is given is not changed, its copy is.

    `calibration` is a path of pictures or text, a data set, PIL pictures, a tensor or an iterable of batches; `count`
    pictures, or sequences of `length` tokens, are drawn from it by `seed`. With `output`, finished units are written
    at once, so that `resume` goes on after an interruption, and the result is saved there. `evaluation` data (or
    `evaluate_count` of them) compare the result with the full-precision model once it is saved; the report then says
    how they differ.
    """
    started = perf_counter()
    if output is not None:
        check_output(Path(output), resume)
    run, seen = _begin(model, method, calibration, count, seed, batch_size, device, length)
    run.progress, network = progress, run.network
    facts = provenance(model_sha256(network.model), run.data, seed, network.device)
    exam = None if evaluation is None else _prepare(network, evaluation, evaluate_count, seen, progress)
    if output is not None:
        run.unfinished = Unfinished(Path(output), _fingerprint(facts, run.method), resume)
    with _single_purpose(), _pool(workers) as pool:
        run.walk(pool, spill_budget)
    result = Result(network, run.method, Report(run.report(facts, perf_counter() - started)))
    if run.unfinished is not None and output is not None:
        result._write(Path(output))
        run.unfinished.remove()
    if exam is not None:
        result.evaluate(exam, None if output is None else Path(output), _counting(progress, "quantized", exam))
    return result


def _prepare(
    network: Network, data: str | Path | DataSet, count: int | None, calibration: Any, progress: Progress | None
) -> Exam:
    """Ask the full-precision network; whatever is wrong with the data is said here, before any other work.

    Raises:
        PathError, InputError: the data do not fit, or some were in the `calibration` too.
    """
    questions = open_data(data) if isinstance(data, str | Path) else data
    if isinstance(calibration, DataSet):
        refuse_overlap(calibration, questions)
    exam = open_exam(network, questions, count)
    return exam.answered_by(network, _counting(progress, "original", exam))


def _counting(progress: Progress | None, what: str, exam: Exam) -> Callable[[int], None] | None:
    if progress is None:
        return None
    say = progress
    return lambda done: say(f"evaluating {what}", done, exam.count)


def plan(
    model: str | Path | nn.Module,
    method: Method | str,
    calibration: Any,
    *,
    count: int | None = None,
    seed: int = 0,
    length: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """What `quantize` would do with the same arguments: layers, sizes, kept layers and why, memory and time.

    Nothing is written; whatever is wrong with the model, the recipe or the pictures is found here.
    """
    run, _ = _begin(model, method, calibration, count, seed, batch_size, device, length)
    model_sha256(run.network.model)  # refuses NaN
    made = make_plan(run.network.model, run.anatomy, run.method, run.network.run, run.data.batches)
    return made | {"original_bytes": run.original_bytes}


def _begin(
    model: str | Path | nn.Module,
    method: Method | str,
    calibration: Any,
    count: int | None,
    seed: int,
    batch_size: int,
    device: str | torch.device | None,
    length: int | None = None,
) -> tuple["_Run", Any]:
    """The run before its first unit, and the calibration data as a set where they are one."""
    method = parse_method(method, {}) if isinstance(method, str) else method
    source = open_data(calibration) if isinstance(calibration, str | Path) else calibration
    network = open_network(model, device or _device_of(model))
    if isinstance(model, nn.Module):
        network.model = copy.deepcopy(network.model).eval()
    data = prepare_calibration(
        source, network.processor, network.channels, count, seed, batch_size, network.device, network.tokenizer,
        min(LENGTH, network.context) if length is None else length,
    )  # fmt: skip
    return _Run(network, method, data), source


def load(
    folder: str | Path, *, into: nn.Module | None = None, device: str | torch.device = "cpu", cached: bool = False
) -> nn.Module:
    """The model of a folder, quantized or not, in evaluation mode.

    A network that was neither a transformers nor a timm model is loaded `into` a full-precision instance of its class.
    `cached` keeps dequantized weights in memory after first use: faster, but no longer small.

    Raises:
        PathError, InputError: there is no model, or it cannot be read.
        StorageError: the file and the network do not fit.
    """
    model = open_network(folder, device).model if into is None else load_into(into, Path(folder)).to(device)
    return cache_weights(model, cached)


def save(result: Result, folder: str | Path) -> None:
    """`result.save(folder)`."""
    result.save(folder)


def _device_of(model: str | Path | nn.Module) -> torch.device:
    if isinstance(model, nn.Module):
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fingerprint(facts: dict[str, Any], method: Method) -> dict[str, Any]:
    versions = {name: facts[name] for name in ("dither", "torch", "transformers", "device")}
    return {
        "model": facts["model_sha256"],
        "calibration data": facts["calibration"]["sha256"],
        "recipe": resolved(method),
        "software or device": versions,
    }


@contextmanager
def _single_purpose():  # type: ignore[no-untyped-def]
    """No gradients, and no reduced precision in statistics and solves."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _pool(workers: int):  # type: ignore[no-untyped-def]
    pool = engine(workers)
    if isinstance(pool, ProcessPool):
        with pool:
            yield pool
    else:
        yield pool


class _Run:
    """One quantization in progress: what has been recorded so far."""

    def __init__(self, network: Network, method: Method, data: Calibration) -> None:
        self.network, self.method, self.data = network, method, data
        self.unfinished: Unfinished | None = None
        self.progress: Progress | None = None
        self.original_bytes = network.stored_bytes
        self.parameters = sum(p.numel() for p in network.model.parameters())
        self.records: list[LayerRecord] = []
        self.operands: list[dict[str, Any]] = []
        self.remarks: dict[str, str] = {}
        self.done = 0
        self.anatomy = self._read()

    def _read(self) -> Anatomy:
        anatomy = without(
            read_anatomy(self.network.model, lambda: self.network.run(self.data.batches[0])), self.method.skip
        )
        for pattern in self.method.overrides:
            matching(pattern, anatomy.layers)
        check_formats(self.network.model, anatomy, self.method)
        return anatomy

    def walk(self, pool: InProcess | ProcessPool, spill_budget: int) -> None:
        blocks = walk(
            self.network.model, self.anatomy, self.network.run, self.data.batches, self.method.inputs, spill_budget,
            self._restore, self._finish,
        )  # fmt: skip
        try:
            self.method.run(blocks, pool)
        finally:
            blocks.close()  # type: ignore[attr-defined]

    def _restore(self, unit: Unit) -> bool:
        kept = None if self.unfinished is None else self.unfinished.restore(self.network.model, unit)
        if kept is None:
            return False
        self._take(unit.name, kept["records"], kept["operands"], kept["remarks"])
        return True

    def _finish(self, block: Block) -> None:
        if self.unfinished is not None:
            self.unfinished.write(block)
        for record in block.records:
            logger.info("%s: output error %s in %.2f s", record.name, record.output_error, record.time_s)
        self._take(block.unit.name, block.records, block.operand_records, block.remarks)

    def _take(
        self, unit: str, records: list[LayerRecord], operands: list[dict[str, Any]], remarks: dict[str, str]
    ) -> None:
        self.records += records
        self.operands += operands
        self.remarks |= remarks
        self.done += 1
        if self.progress is not None:
            self.progress(unit, self.done, len(self.anatomy.units))

    def report(self, facts: dict[str, Any], time_s: float) -> dict[str, Any]:
        """The report data of kind `quantize`."""
        weights = sum(record.shape[0] * record.shape[1] for record in self.records)
        stored = sum(record.nbytes for record in self.records)
        state = self.network.model.state_dict().values()
        return {
            "schema": 1,
            "kind": "quantize",
            "model": {
                "name": self.network.name,
                "class": type(self.network.model).__name__,
                "parameters": self.parameters,
                "source": self.network.name if self.network.source is None else str(self.network.source),
            },
            "recipe": resolved(self.method),
            "provenance": facts,
            "totals": {
                "parameters": self.parameters,
                "quantized_parameters": weights,
                "bits_per_weight": 8 * stored / weights if weights else 0.0,
                "size_bytes": sum(x.numel() * x.element_size() for x in state),
                "original_bytes": self.original_bytes,
                "time_s": time_s,
                "peak_rss_bytes": peak_rss(),
            },
            "layers": [asdict(record) for record in self.records],
            "operands": self.operands,
            "coverage": coverage(self.network.model, self.anatomy.kept, self.remarks),
            "evaluation": None,
        }


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
