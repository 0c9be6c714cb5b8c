"""`dither allocate`: which bits where, within a budget, as a file that `dither quantize` reads."""

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.options import (
    BatchSize,
    Calibration,
    Debug,
    Device,
    EngineOption,
    Force,
    Json,
    Length,
    Model,
    Quiet,
    RayAddress,
    Samples,
    Seed,
    Workers,
    check_new,
    chosen_device,
    going_on,
    listed,
    read_bytes,
    scores_beside,
)
from dither.cli.terminal import Terminal

_BUDGET = "How much it may take"
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE.yaml", help="Where the allocation goes; of several budgets each has a "
                 "file with its bits in the name. A report goes beside it.", show_default=False),
]  # fmt: skip
Bits = Annotated[
    str | None,
    typer.Option(metavar="B[,B…]", help="Average bits a weight of the quantized layers, scales included.",
                 show_default=False, rich_help_panel=_BUDGET),
]  # fmt: skip
Size = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="Of the whole model, such as 3.2GB or 20MB.", show_default=False,
                 rich_help_panel=_BUDGET),
]  # fmt: skip
Limit = Annotated[
    list[str] | None,
    typer.Option(metavar="RESOURCE=N", help="Of bops, activations, codes or latency; may be repeated.",
                 show_default=False, rich_help_panel=_BUDGET),
]  # fmt: skip
Accuracy = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Instead of a budget: the share of the model's own predictions to keep, such as "
                 "0.99; least size, or least time with --latency.", show_default=False, rich_help_panel=_BUDGET),
]  # fmt: skip
LatencyFile = Annotated[
    str | None,
    typer.Option("--latency", metavar="FILE.json", help="Measured times: layer name or OxI → format → time.",
                 show_default=False, rich_help_panel=_BUDGET),
]  # fmt: skip
By = Annotated[
    str,
    typer.Option(metavar="NAME", help="What is measured; settings follow, as in hawq-v2+probes=20. mixdq and vidit "
                 "measure each --class by itself, dp-beam also measures choices as a whole."),
]  # fmt: skip
Class = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="PATTERN,…[=NAME]", help="For --by mixdq (one) or vidit: layers with a budget of "
                 "their own, and what is measured of them (kl); may be repeated.", show_default=False),
]  # fmt: skip
Solver = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="milp, lagrangian, dp, hawq-v2, uniform, even, pairwise or clusters.", show_default=False
    ),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Then run the model with the formats that were chosen, and with two formats mixed "
                 "evenly at the same size, on another draw of the data: was it worth it?"),
]  # fmt: skip
Options = Annotated[
    str | None,
    typer.Option(metavar="FORMATS", help="Formats to choose from, such as int2:g64,int4:g64,int8:g64 "
                 "(default: 2, 3, 4, 6 and 8 bits).", show_default=False),
]  # fmt: skip
Name = Annotated[
    str,
    typer.Option("--method", "-m", metavar="NAME", help="What will quantize: its defaults complete the formats, "
                 "and its own weights are measured where it solves layer by layer (gptq, spqr, hqq, billm, lorc)."),
]  # fmt: skip
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to keep as they are; may be repeated.", show_default=False),
]
Tie = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN,…", help="Layers that share a format; may be repeated.", show_default=False),
]
Scores = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where the score table is kept, to be measured once (default: beside the "
                 "output).", show_default=False),
]  # fmt: skip


def allocate(
    model: Model,
    calibration: Calibration,
    output: Output = None,
    force: Force = False,
    bits: Bits = None,
    size: Size = None,
    limit: Limit = None,
    accuracy: Accuracy = None,
    latency: LatencyFile = None,
    by: By = "fisher",
    classes: Class = None,
    solver: Solver = None,
    verify: Verify = False,
    options: Options = None,
    method: Name = "rtn",
    skip: Skip = None,
    tie: Tie = None,
    scores: Scores = None,
    samples: Samples = None,
    length: Length = None,
    batch_size: BatchSize = 32,
    workers: Workers = 1,
    engine: EngineOption = "auto",
    ray_address: RayAddress = None,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose the format of each layer within a budget.

    Layers that runtimes fuse (q, k and v; gate and up; experts) share a format. The scores are measured once: other
    budgets for the same model, data and formats take no time.

    Examples:

        dither allocate llama/ --calibration text.txt --bits 4.25 -o bits.yaml

        dither allocate vit/ --calibration pictures/ --size 20MB --by hawq-v2 --options int3,int4,int8 -o bits.yaml

        dither allocate llama/ --calibration text.txt --bits 2.5,3,3.5 --by kl --method gptq --samples 16 -o bits.yaml

        dither allocate vit/ --calibration pictures/ --accuracy 0.99 --by augmented -o bits.yaml

        dither allocate vit/ --calibration pictures/ --bits 4.5 --by mixdq --class '*mlp*=quadratic' -o bits.yaml
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        limits = _limits(limit or [])
        wanted: list[float | None] = [_number("--bits", text) for text in dict.fromkeys(listed(bits or ""))] or [None]
        most = None if size is None else read_bytes(size)
        apart = _classes(by, classes or [], asked=any((accuracy, limits, solver)))
        _check_asked(accuracy, bits, most, limits, solver)
        files, folder = _files(output, wanted, force=force), scores or scores_beside(output)
        how: dict[str, Any] = {
            "options": None if options is None else listed(options), "method": method, "skip": skip or (),
            "ties": tie or (), "latency": _latency(latency), "scores": folder, "count": samples, "seed": seed,
            "length": length, "batch_size": batch_size, "device": chosen_device(device),
            "workers": workers, "engine": engine, "ray_address": ray_address,
        }  # fmt: skip
        with going_on(folder), terminal.progress(by) as how["progress"]:
            if accuracy is not None:
                table, found = _to_accuracy(model, calibration, accuracy, by, how)
            elif apart or by.partition("+")[0] == "dp-beam":
                table, found = _searched(model, calibration, by, apart, wanted, most, how)
            else:
                table, found = _within(model, calibration, wanted, how, size=most, limits=limits, by=by, solver=solver)
            found, verdicts = _verified(model, calibration, table, found, how) if verify else (found, [])
        _show(terminal, table, found, _write(table, found, files), (model, calibration, method), verdicts)


def _check_asked(accuracy: float | None, bits: str | None, most: float | None, limits: Any, solver: str | None) -> None:
    """Something says how much it may take; an accuracy goes without what else does."""
    if bits is None and most is None and not limits and accuracy is None:
        raise typer.BadParameter(
            "say how much it may take: --bits, --size or --limit, or --accuracy", param_hint="--bits"
        )
    if accuracy is not None and any((bits, most, limits, solver)):
        raise typer.BadParameter(
            "goes without a budget and a solver: it finds the least by itself", param_hint="--accuracy"
        )


def _classes(by: str, texts: list[str], *, asked: bool) -> dict[str, str]:
    """The measure of each class of layers; none where the way to allocate knows no classes."""
    from dither.by_classes import REST, WAYS

    if (by in WAYS) != bool(texts):
        raise typer.BadParameter("goes with --by mixdq or vidit, and these need it", param_hint="--class")
    if (texts or by.partition("+")[0] == "dp-beam") and asked:
        raise typer.BadParameter("takes --bits or --size and nothing else", param_hint=f"--by {by}")
    parts = [text.rpartition("=") if "=" in text else (text, "", REST) for text in texts]
    return {patterns.strip(): measure.strip() for patterns, _, measure in parts}


def _within(
    model: str, calibration: str, wanted: list[float | None], how: dict[str, Any], **budget: Any
) -> tuple[Any, list[Any]]:
    """The table and an allocation for each number of bits."""
    from dither import allocating
    from dither.sensitivity import measure

    table = measure(model, allocating.allocator_named(budget["by"]).sensitivity, calibration, **how)
    return table, [allocating.allocate(table, bits=one, **budget) for one in wanted]


def _verified(
    model: str, calibration: str, table: Any, found: list[Any], how: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """The allocations with what they do to predictions, and what that says."""
    from dither.verifying import verified

    pairs = [verified(model, calibration, table, one, **how) for one in found]
    return [one for one, _ in pairs], [verdict for _, verdict in pairs]


def _searched(
    model: str, calibration: str, by: str, classes: dict[str, str], wanted: list[float | None], most: float | None,
    how: dict[str, Any],
) -> tuple[Any, list[Any]]:  # fmt: skip
    """The table and an allocation for each number of bits, found by evaluating choices."""
    from dither.beam_search import allocate_by_beam
    from dither.by_classes import allocate_by_classes

    way = partial(allocate_by_classes, way=by, classes=classes) if classes else partial(allocate_by_beam, text=by)
    found = [way(model, calibration, bits=bits, size=most, **how) for bits in wanted]
    return found[-1][0], [allocation for _, allocation in found]


def _to_accuracy(model: str, calibration: str, accuracy: float, by: str, how: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The table and the one allocation."""
    from dither.accuracy import allocate_to_accuracy
    from dither.allocating import allocator_named

    cost, by = "size" if how["latency"] is None else "latency", allocator_named(by).sensitivity
    table, found = allocate_to_accuracy(model, calibration, accuracy, by=by, cost=cost, **how)
    return table, [found]


def _limits(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"expected RESOURCE=N, got {text!r}", param_hint="--limit")
        found[name.strip()] = read_bytes(value) if name.strip() == "size" else _number("--limit", value)
    return found


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number, got {text!r}", param_hint=option) from None


def _latency(path: str | None) -> Mapping[str, Mapping[str, float]] | None:
    import json

    from dither.errors import InputError, PathError

    if path is None:
        return None
    if not Path(path).is_file():
        raise PathError(f"latency table {path!r} does not exist")
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise InputError(f"latency table {path!r} is not JSON: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(times, dict) for times in data.values()):
        raise InputError(f"latency table {path!r}: expected layer or OxI → format → time")
    return data


def _files(output: str | None, wanted: list[float | None], *, force: bool) -> dict[float | str | None, Path]:
    """Where the allocation of each budget goes, and under `report` what they look like; nothing is replaced unasked."""
    from dither.errors import InputError

    if output is None:
        return {}
    path = Path(output)
    if path.suffix == ".html":
        raise InputError(f"output {output!r}: the allocation is YAML, such as bits.yaml; its report goes beside it")
    several = len(wanted) > 1
    files: dict[float | str | None, Path] = {
        bits: path.with_stem(f"{path.stem}-{bits:g}") if several else path for bits in wanted
    }
    files["report"] = path.with_suffix(".html")
    check_new(list(files.values()), force=force)
    return files


def _write(table: Any, found: list[Any], files: dict[float | str | None, Path]) -> list[str]:
    """The allocations and their report; the allocations' names."""
    from dither.allocations import write_allocation
    from dither.report.allocation import allocation_report
    from dither.report.html import write_html

    if not files:
        return []
    report = files.pop("report")
    for allocation, path in zip(found, files.values(), strict=True):
        write_allocation(allocation, path)
    write_html(allocation_report(table, found), report)
    return [str(path) for path in files.values()]


def _show(
    terminal: Terminal, table: Any, found: list[Any], files: list[str], asked: tuple[str, str, str], verdicts: list[Any]
) -> None:
    from dither.report.allocation import allocation_rows, option_rows

    data = [one.to_data() for one in found]
    terminal.show({"allocations": data, "files": files} if len(found) > 1 else {**data[0], "files": files})
    terminal.table(option_rows(table, found[-1]), "Formats", ("Bits", "Score", "± "), ("± ",))
    terminal.table(allocation_rows(found), "Allocations")
    for verdict in verdicts:
        terminal.line(verdict.text())
    for path in files:
        terminal.line(f"saved in {path}")
    if files:
        model, calibration, method = map(shlex.quote, asked)
        terminal.line(
            f"use it: dither quantize {model} --calibration {calibration} --method {method} "
            f"--allocation {shlex.quote(files[0])} -o OUT"
        )
