"""quantize: read the model, walk it with a method, report, save."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dither.allocation.allocation import Allocation
from dither.allocations import allocated, kept_promise, read_allocation
from dither.data import DataSet, open_data
from dither.data.calibration import LENGTH, Calibration, prepare_calibration
from dither.distilled import DISTILLED, calibration_without_data
from dither.engine.local import Engine
from dither.engine.opened import opened, team_of
from dither.engine.purpose import full_floats, single_purpose
from dither.engine.ranks import Ranks
from dither.engine.team import ALONE, Team
from dither.errors import InputError
from dither.evaluation.exam import Exam, open_exam, refuse_overlap
from dither.methods.base import Method
from dither.models.distil import Distillation
from dither.models.network import Network, load_into, open_network
from dither.models.preparing import Prepared, Subject
from dither.models.streaming import exceeds_memory
from dither.nn.linear import cache_weights
from dither.planning import SPILL_BUDGET
from dither.provenance import provenance
from dither.recipe import parse_method, resolved
from dither.result import Report, Result
from dither.run import Progress, Run
from dither.runtime_rules import findings, refuse
from dither.unfinished import Unfinished, check_output

logger = logging.getLogger(__name__)


@full_floats()
def quantize(
    model: str | Path | nn.Module,
    method: Method | str,
    calibration: Any = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    count: int | None = None,
    seed: int = 0,
    length: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    engine: Engine | str = "auto",
    workers: int = 1,
    ray_address: str | None = None,
    stream: bool | None = None,
    spill_budget: int = SPILL_BUDGET,
    evaluation: str | Path | DataSet | None = None,
    evaluate_count: int | None = None,
    runtime: str | None = None,
    allocation: Allocation | str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model; a module that is given is not changed, its copy is.

    `calibration` is a path of pictures or text, a data set, PIL pictures, a tensor or an iterable of batches; `count`
    pictures, or sequences of `length` tokens, are drawn from it by `seed`. "distilled" makes pictures from the model's
    batch normalizations, as does None for a method that needs no data. With `output`, finished units are written
    at once, so that `resume` goes on after an interruption, and the result is saved there. `evaluation` data (or
    `evaluate_count` of them) compare the result with the full-precision model once it is saved; the report then says
    how they differ. `runtime` names where the result is to run: what would not run there is refused before the work
    begins. `stream` reads a folder block by block, for models larger than memory; None does it where the
    whole would take more than half of the memory. `allocation`, or the file of one, gives each layer its format; the
    report says whether the promised bits were kept. `engine` is where the work runs: `auto`, `local`, `torchrun`,
    `ray`, or an engine of your own; see `dither.engine.opened`.
    """
    started = perf_counter()
    if output is None and stream:
        raise InputError("a model that is read block by block needs an output, which its finished units are written to")
    method, bits = _with_bits(method, allocation)
    place, stream = None if output is None else Path(output), False if output is None else stream
    with opened(engine, workers, device, ray_address) as pool:
        team, device = team_of(pool), pool.device if isinstance(pool, Ranks) else device
        if place is not None:
            team.agree(lambda: check_output(place, resume))
        run, seen = begin(model, method, calibration, count, seed, batch_size, device, length, stream, progress, team)
        if runtime is not None:
            refuse(findings(run.network, run.anatomy, run.method, runtime), runtime)
        facts = provenance(run.sha256, run.data, seed, run.network.device)
        exam: list[Exam] = []  # rank 0's alone
        if evaluation is not None:
            team.agree(lambda: exam.append(_prepare(run.network, evaluation, evaluate_count, seen, progress)))
        if place is not None:
            run.unfinished = _unfinished(place, _fingerprint(facts, run.recipe), resume, team)
        with single_purpose():
            run.walk(pool, spill_budget)
        result = _result(run, facts, perf_counter() - started, bits)
        if place is not None:
            _save(result, place, run.unfinished, team)
        if evaluation is not None:
            team.agree(lambda: result.evaluate(exam[0], place, _counting(progress, "quantized", exam[0])))
    return result


def _result(run: Run, facts: dict[str, Any], time_s: float, bits: Allocation | None) -> Result:
    report = run.report(facts, time_s)
    if bits is not None:
        report["allocation"] = kept_promise(bits, report["layers"], facts["model_sha256"])
    return Result(run.network, run.recipe, Report(report))


def _save(result: Result, place: Path, unfinished: Unfinished | None, team: Team) -> None:
    """Rank 0 writes; then all have their tensors from there, and what was unfinished goes."""
    team.agree(lambda: result._write(place))
    result.network.saved(place)
    if unfinished is not None:
        team.agree(unfinished.remove)


def _unfinished(place: Path, fingerprint: dict[str, Any], resume: bool, team: Team) -> Unfinished:
    """Rank 0 makes the folder, the others find it there."""
    own: list[Unfinished] = []
    team.agree(lambda: own.append(Unfinished(place, fingerprint, resume)))
    return own[0] if own else Unfinished(place, fingerprint, resume=True)


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
    calibration: Any = None,
    *,
    count: int | None = None,
    seed: int = 0,
    length: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    stream: bool | None = None,
    runtime: str | None = None,
    allocation: Allocation | str | Path | None = None,
) -> dict[str, Any]:
    """What `quantize` would do with the same arguments: layers, sizes, kept layers and why, memory and time.

    Nothing is written; whatever is wrong with the model, the recipe or the data is found here. Nothing is distilled or
    measured, so bits that a method would choose are the same for every layer here. `findings` say what
    keeps the result from running in `runtime`, or makes it slow there.
    """
    method, _ = _with_bits(method, allocation)
    run, _ = begin(model, method, calibration, count, seed, batch_size, device, length, stream, foresee=method.foresee)
    return run.plan(runtime)


def _with_bits(method: Method | str, allocation: Allocation | str | Path | None) -> tuple[Method, Allocation | None]:
    """The method with the formats of an allocation, and the allocation itself."""
    method = parse_method(method, {}) if isinstance(method, str) else method
    if allocation is None:
        return method, None
    bits = read_allocation(allocation) if isinstance(allocation, str | Path) else allocation
    return allocated(method, bits), bits


@full_floats()
def begin(
    model: str | Path | nn.Module,
    method: Method | str,
    calibration: Any,
    count: int | None,
    seed: int,
    batch_size: int,
    device: str | torch.device | None,
    length: int | None,
    stream: bool | None,
    progress: Progress | None = None,
    team: Team = ALONE,
    foresee: Callable[[Subject], Prepared] | None = None,
) -> tuple[Run, Any]:
    """The run before its first unit, and the calibration data as a set where they are one.

    A plan gives `foresee`, which takes the place of the method's preparation; pictures stay the noise they start from.
    """
    method = parse_method(method, {}) if isinstance(method, str) else method
    own = method.without_data()
    if calibration is None and own is None:
        raise InputError(f"{method.name} needs calibration data: a folder of pictures, a text file, tensors, …")
    made = calibration is None or (isinstance(calibration, str) and calibration == DISTILLED)
    source = open_data(calibration) if isinstance(calibration, str | Path) and not made else calibration
    network = _open(model, device, stream, team)
    if made:
        settings = own or Distillation()
        settings = settings if foresee is None else settings.model_copy(update={"steps": 0})
        pictures, facts = team.agree(  # gradients on a GPU differ in their last bits, and ranks share these pictures
            lambda: calibration_without_data(network, settings, count, seed, batch_size, progress)
        )
        run = Run(network, method, pictures, progress, team, foresee)
        run.facts |= {"distilled": facts} if facts else {}
        return run, None
    data = draw(network, source, count, seed, batch_size, length)
    return Run(network, method, data, progress, team, foresee), source


def draw(
    network: Network, source: Any, count: int | None, seed: int, batch_size: int, length: int | None
) -> Calibration:
    """Samples of calibration data for a network; of tensors and ready batches every draw is the same."""
    return prepare_calibration(
        source, network.processor, network.channels, count, seed, batch_size, network.device, network.tokenizer,
        min(LENGTH, network.context) if length is None else length,
    )  # fmt: skip


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


def _open(model: str | Path | nn.Module, device: str | torch.device | None, stream: bool | None, team: Team) -> Network:
    """The network to quantize: a module's copy, or a folder's model, whole or block by block."""
    if isinstance(model, nn.Module):
        if stream:
            raise InputError("a module in memory cannot be read block by block; give the folder of its weights")
        network = open_network(model)
        network.model = copy.deepcopy(model).eval().to(device)
        return network
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if stream or (stream is None and team.agree(lambda: exceeds_memory(Path(model), place, team.size))):
        try:
            return open_network(model, place, stream=True)
        except InputError as error:
            if stream:
                raise
            logger.warning("%s; all of it is read into memory", error)
    return open_network(model, place)


def _fingerprint(facts: dict[str, Any], method: Method) -> dict[str, Any]:
    versions = {name: facts[name] for name in ("dither", "torch", "transformers", "device")}
    return {
        "model": facts["model_sha256"],
        "calibration data": facts["calibration"]["sha256"],
        "recipe": resolved(method),
        "software or device": versions,
    }
