"""measure: the score table of a model, from one of the sensitivities, kept in a folder so that it is measured once."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dither.allocation.table import Option, ScoreTable, Unit
from dither.data.calibration import Calibration, is_drawn
from dither.engine.local import Engine
from dither.engine.opened import opened, team_of
from dither.engine.purpose import single_purpose
from dither.errors import InputError
from dither.methods.base import Method
from dither.models.layers import is_layer, matrix_shape
from dither.pipeline import begin, draw
from dither.provenance import provenance
from dither.recipe import parse_method, resolved
from dither.run import Progress, Run
from dither.sensitivities import parse_sensitivity
from dither.sensitivities.base import Kept, Probe, Sensitivity
from dither.sensitivities.solved import Solved
from dither.sensitivities.units import able, find_units, fixed_parts, trace, unit_costs
from dither.storage import write_json

BITS = (2, 3, 4, 6, 8)
GROUP = 64
TABLE = "table.json"


def measure(
    model: str | Path | nn.Module,
    sensitivity: Sensitivity | str,
    calibration: Any,
    *,
    options: Sequence[str] | None = None,
    method: str = "rtn",
    skip: Sequence[str] = (),
    ties: Sequence[str] = (),
    latency: Mapping[str, Mapping[str, float]] | None = None,
    scores: str | Path | None = None,
    count: int | None = None,
    seed: int = 0,
    judge_seed: int | None = None,
    length: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    stream: bool | None = None,
    engine: Engine | str = "auto",
    workers: int = 1,
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """What each option would cost each unit of a model, in loss and in resources.

    `options` are formats such as `int4:g64`, `int4:g64/int8:token` (with the format of inputs) or `none`, completed as
    `method` completes its `weights`; by default integers of 2, 3, 4, 6 and 8 bits, in groups of 64 where all layers
    allow it. Where `method` can solve a layer by itself (gptq, spqr, hqq, billm, lorc), the weights that are scored are
    its own, solved behind full-precision inputs; else they are the nearest codes. Solved weights seem better than they
    are on the samples that they were solved on, those of `seed`, so the scores are of another draw, of `judge_seed`
    (the next; `error` needs none), which overlaps where data are few. `skip` and `ties` are patterns: layers to leave
    out, and, comma-separated, layers that share a choice. With a folder `scores` an interrupted measurement goes on.
    `stream` reads the model block by block, as `quantize` does; only `error` can be measured then. `engine` is where
    probes run, as in `quantize`, but not on torchrun's ranks; `workers` each have a copy of the model.

    Raises:
        InputError: data, options or patterns do not fit the model.
    """
    chosen = parse_sensitivity(sensitivity) if isinstance(sensitivity, str) else sensitivity
    rtn = parse_method("rtn", {"skip": list(skip)})  # another method's default format may fit no layer of this model
    run, source = begin(model, rtn, calibration, count, seed, batch_size, device, length, stream, progress)
    used = parse_method(method, {})
    judge_seed = seed + int(_solves(used)) if judge_seed is None else judge_seed
    judged = run.data if judge_seed == seed else _other(run, source, count, judge_seed, batch_size, length)
    parsed = read_options(options or default_options(run), used)
    with single_purpose(), opened(engine, workers, device, ray_address) as pool:
        _check_alone(pool)
        traced = trace(run.network, run.anatomy, run.data.batches[0])
        units = find_units(run.network, run.anatomy, traced, ties)
        possible = able(run.network, units, parsed)
        _check_able(units, possible)
        facts = _facts(run, judged, chosen, parsed, used, method, seed)
        folder = None if scores is None else Path(scores) / f"{chosen.name}-{_digest(facts, units)}"
        known = None if folder is None else _read(folder / TABLE)
        costs = unit_costs(run.network, units, parsed, possible, traced, latency)
        if known is None:
            started = perf_counter()
            with _kept_in(None if folder is None else folder / "parts", used) as (kept, solved):
                probe = Probe(
                    run.network, run.anatomy, judged.batches, units, parsed, possible, seed, kept, progress, pool,
                    solved, run.data.batches,
                )  # fmt: skip
                found = chosen.measure(probe)
            facts |= {"time_s": perf_counter() - started, **found.facts}
            known = ScoreTable(
                units, parsed, found.scores, costs, fixed_parts(run.network, run.anatomy, units),
                found.priority, found.errors, found.pairs, facts,
            )  # fmt: skip
            _keep(known, folder)
    return replace(known, costs=costs)  # a latency table may be another one than when the scores were measured


def _other(run: Run, source: Any, *asked: Any) -> Calibration:
    """Another draw of what the run has samples of, where they were drawn."""
    return draw(run.network, source, *asked) if is_drawn(source) else run.data


def read_options(texts: Sequence[str], method: Method) -> tuple[Option, ...]:
    """Options as a method understands them: what a text leaves out is as in the method's `weights` and `activations`.

    Raises:
        InputError: none, twice the same, or a format that the method cannot store.
    """
    found = []
    for text in texts:
        weights, _, activations = (part.strip() for part in text.partition("/"))
        given = {"weights": weights} if weights not in ("none", "fp") else {}
        read = parse_method(method.name, given | ({"activations": activations} if activations else {}))
        if given and (read.weights.kind not in method.kinds or read.weights.dynamic):
            raise InputError(f"option {text!r}: {method.name} stores weights as one of {', '.join(method.kinds)}")
        found.append(Option(read.weights if given else None, read.activations if activations else None))
    if len(set(found)) < len(found) or not found:
        raise InputError(f"options are to be different formats, got {', '.join(texts) or 'none'}")
    return tuple(found)


def default_options(run: Run) -> list[str]:
    """Integers of several widths, in groups of 64 inputs where these divide the columns of every layer."""
    layers = [run.network.model.get_submodule(name) for name in run.anatomy.layers]
    grouped = all(matrix_shape(layer)[1] % GROUP == 0 for layer in layers if is_layer(layer))
    return [f"int{bits}:g{GROUP}" if grouped else f"int{bits}:channel" for bits in BITS]


def _check_alone(pool: Engine) -> None:
    if team_of(pool).size > 1:
        raise InputError("a score table is measured by one process and its workers; start it without torchrun")


def _check_able(units: Sequence[Unit], possible: Any) -> None:
    for unit, row in zip(units, possible, strict=True):
        if not row.any():
            raise InputError(f"{unit.name} can be stored as none of the options; add one, such as int4 or none")


@contextmanager
def _kept_in(folder: Path | None, method: Method) -> Iterator[tuple[Kept, Solved | None]]:
    """Where finished parts lie, and the weights that a method solves, which without a folder do not outlive this."""
    if not _solves(method):
        yield Kept(folder), None
    elif folder is not None:
        yield Kept(folder), Solved(method, folder / "weights")
    else:
        with TemporaryDirectory(prefix="dither-scores-") as made:
            yield Kept(None), Solved(method, Path(made))


def _solves(method: Method) -> bool:
    """Whether the weights that are scored are the method's own."""
    return method.alone(method.weights) is not None


def _facts(
    run: Run, judged: Calibration, chosen: Sensitivity, options: Sequence[Option], used: Method, method: str, seed: int
) -> dict[str, Any]:
    """What decides the scores: the table's key."""
    known = provenance(run.sha256, run.data, seed, run.network.device)
    solver = {"solver": resolved(used)} if _solves(used) else {}  # whose weights are scored
    elsewhere = {} if judged is run.data else {"judged_on": judged.sha256}
    facts = {
        "model": run.network.name,
        "sensitivity": chosen.name,
        "settings": dict(vars(chosen)),
        "method": method,
        "options": [str(option) for option in options],
        **solver,
        **elsewhere,
        **known,
    }
    return dict(json.loads(json.dumps(facts)))  # plain texts and numbers, as they will be read again


def _digest(facts: Mapping[str, Any], units: Sequence[Any]) -> str:
    text = json.dumps([facts, [unit.layers for unit in units]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _keep(table: ScoreTable, folder: Path | None) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(table.to_data(), folder / TABLE)
    shutil.rmtree(folder / "parts", ignore_errors=True)


def _read(path: Path) -> ScoreTable | None:
    if not path.is_file():
        return None
    try:
        return ScoreTable.from_data(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is no table of scores ({error}); remove it to measure again") from None
