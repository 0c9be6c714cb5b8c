"""tune: search over methods, formats and calibration for one model, each trial a real quantization that is measured."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither.data import DataSet
from dither.engine.local import Engine, InProcess
from dither.engine.opened import opened
from dither.errors import DitherError, InputError
from dither.evaluation.exam import BATCH
from dither.quantune.bench import Bench
from dither.quantune.choices import dimensions_of
from dither.quantune.data import open_tuning_data
from dither.quantune.ledger import Ledger, Progress
from dither.quantune.problem import pose
from dither.quantune.winner import save_winner
from dither.result import Report
from dither.tuning import check_strategy, make_strategy
from dither.tuning.journal import FILE, Journal, read_journal
from dither.tuning.loop import search
from dither.tuning.objective import Objective, read_limits
from dither.tuning.space import Space, Value
from dither.tuning.surrogate import Earlier, Surrogate
from dither.tuning.trial import Outcome, Task, Trial, best, penalized


def tune(
    model: str | Path | nn.Module,
    calibration: str | Path | DataSet,
    output: str | Path,
    *,
    data: str | Path | DataSet | None = None,
    test: str | Path | DataSet | None = None,
    trials: int = 40,
    objective: str | None = None,
    limits: Sequence[str] = (),
    methods: Sequence[str] = (),
    weights: Sequence[str] = ("int4",),
    activations: Sequence[str] = ("none",),
    among: Mapping[str, Sequence[Value]] | None = None,
    strategy: str = Surrogate.name,
    earlier: Sequence[str | Path] = (),
    resume: bool = False,
    seed: int = 0,
    evaluate_count: int | None = None,
    length: int | None = None,
    batch_size: int = BATCH,
    device: str | torch.device | None = None,
    workers: int = 1,
    run_on: Engine | str = "local",
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Try `trials` configurations of a model, write each to `output/trials.jsonl`, save the best in `output/best`.

    Trials are calibrated on `calibration` and judged by `data`, never by the `test` data, which only the best sees.
    Without `data`, `calibration` is split. `objective` is accuracy, perplexity, kl or size (by default accuracy of
    labelled pictures, perplexity of text, else kl); `limits` are texts such as `size=20MB`. `methods` (all that fit),
    `weights` and `activations` are chosen among, as are the values of other dimensions that `among` gives. `earlier`
    are trials of other models, which the surrogate begins with. `workers` trials run at once, on processes, Ray or
    what else `run_on` reaches; a killed run goes on with `resume`, also to more trials.

    Raises:
        InputError: data overlap, nothing fits, or the folder is in use.
        ResumeError: the trials that are there are of another run.
        DitherError: no trial succeeded, or none kept the limits; what was measured is in the report.
    """
    wanted = read_limits(limits)  # what is wrong with a text is said before any work
    _check_search(trials, strategy, bool(earlier))
    journals = [read_journal(path) for path in earlier]
    folder, place = Path(output), str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_folder(folder, resume)
    given = dict(among or {})
    samples = given.pop("samples", None)
    sets = open_tuning_data(calibration, data, test, samples, seed, folder, evaluate_count)
    bench = Bench(model, sets.calibration, sets.data, evaluate_count, length, batch_size, place)
    dimensions = partial(dimensions_of, methods, weights, activations, given)
    problem = pose(bench, sets, objective, wanted, samples, dimensions, seed)
    lessons, learned = _lessons(journals, problem.aim, problem.space)
    searcher = make_strategy(strategy, problem.space, seed, problem.features, lessons)
    sets.keep(folder)
    how = {"strategy": strategy, "seed": seed, "number of trials at once": workers}
    journal = Journal(folder / FILE, problem.header({**how, "earlier trials": _digests(earlier)}), resume)
    ledger = Ledger(problem, journal, seed, trials, progress)
    with opened(run_on, workers, place, ray_address) as pool:
        run_trials = partial(run_each, pool, bench)
        found = search(searcher, trials, ledger.task, run_trials, ledger.judge, ledger.known(), workers)
    ended = [f"all {len(found)} configurations of the space were tried"] if len(found) < trials else []
    report = {
        "schema": 1, "kind": "tune", "model": {**problem.model, "source": problem.model["name"]},
        "settings": {**how, "earlier": [str(path) for path in earlier], **problem.settings()},
        "provenance": problem.facts, "reference": problem.reference,
        "trials": [ledger.row(trial) for trial in found], "best": None,
        "notes": [*sets.notes, *problem.choices.notes, *learned, *ended],
    }  # fmt: skip
    return _finish(report, found, ledger, folder)


def _check_search(trials: int, strategy: str, lessons: bool) -> None:
    if trials < 1:
        raise InputError(f"expected at least 1 trial, got {trials}")
    check_strategy(strategy, lessons)


def _finish(report: dict[str, Any], found: Sequence[Trial], ledger: Ledger, folder: Path) -> Report:
    """Save the best and the report.

    Raises:
        DitherError: there is no best; the report is saved all the same.
    """
    winner = best(found)
    if winner is not None:
        report["best"] = ledger.row(winner)
        task = ledger.task(winner.number, winner.point)
        report["best"] |= save_winner(ledger.problem.bench, task, ledger.problem.sets, folder, ledger.progress)
    made = Report(report)
    for name in ("report.json", "report.html"):
        made.save(folder / name)
    if winner is not None:
        return made
    failures = [row for row in report["trials"] if row["error"]]
    if len(failures) == len(found):
        raise DitherError(f"all {len(found)} trials failed; the first: {failures[0]['error']}")
    near = min(found, key=lambda trial: trial.rank)
    raise DitherError(
        f"none of {len(found)} trials kept the limits; the nearest, trial {near.number}, breaks them by "
        f"{100 * near.violation:.1f}%: give wider limits or other formats, or more trials with --resume"
    )


def run_each(pool: Engine, bench: Bench, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Run tasks on an engine; each outcome comes as soon as it is there."""
    if isinstance(pool, InProcess) or len(tasks) == 1:
        yield from pool.map(bench.run, tasks)
        return
    with ThreadPoolExecutor(len(tasks)) as threads:  # an engine gives outcomes in order; each thread waits for one
        waiting = [threads.submit(_alone, pool, bench, task) for task in tasks]
        for future in as_completed(waiting):
            yield future.result()


def _alone(pool: Engine, bench: Bench, task: Task) -> Outcome:
    return next(iter(pool.map(bench.run, [task])))


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, before any work.

    Raises:
        InputError: it is a file, is not empty, or holds trials and `resume` was not asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {str(folder)!r} is a file; choose a folder")
    if (folder / FILE).exists():
        if not resume:
            raise InputError(f"{str(folder)!r} holds the trials of a search already; pass --resume to go on")
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output {str(folder)!r} is not empty; choose another folder or remove it")


def _lessons(
    journals: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]], aim: Objective, space: Space
) -> tuple[list[Earlier], list[str]]:
    """The trials of earlier searches in the cost of this one's objective, and what was left out of them."""
    lessons: list[Earlier] = []
    notes = []
    for header, records in journals:
        name = header["model"]["name"]
        usable = [one for one in records if set(space.names) <= set(one["configuration"])]
        costs = [None if one["error"] else aim.cost(one["figures"], header["reference"]) for one in usable]
        if not any(cost is not None for cost in costs):
            raise InputError(f"the search on {name} has no trial with a figure for objective {aim.name}; leave it out")
        scaled = penalized([Trial(number, (), cost) for number, cost in enumerate(costs)])
        lessons += [
            Earlier({name: one["configuration"][name] for name in space.names}, float(cost), header["features"])
            for one, cost in zip(usable, scaled, strict=True)
        ]
        left = f", {len(records) - len(usable)} of other dimensions left out" if len(usable) < len(records) else ""
        notes.append(f"the surrogate began with {len(usable)} trials of {name}{left}")
    return lessons, notes


def _digests(earlier: Sequence[str | Path]) -> list[str]:
    """Of the journals that are learned from."""
    files = [Path(path) / FILE if Path(path).is_dir() else Path(path) for path in earlier]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
