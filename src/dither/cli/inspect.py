"""`dither inspect`: layer by layer, what was done to a model or could be."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.compare import show_comparison
from dither.cli.options import (
    BatchSize,
    Debug,
    Device,
    EngineOption,
    Force,
    Json,
    Length,
    Quiet,
    RayAddress,
    Samples,
    Seed,
    Workers,
    check_new,
    chosen_device,
    going_on,
    listed,
    scores_beside,
)
from dither.cli.terminal import Terminal
from dither.cli.tune import show_search

Folder = Annotated[
    str, typer.Argument(metavar="OUT_OR_MODEL", help="Folder of a model, quantized or not.", show_default=False)
]
Layers = Annotated[bool, typer.Option("--layers", help="Only the layers.")]
Coverage = Annotated[bool, typer.Option("--coverage", help="Only what is quantized or kept, module by module.")]
_MEASURE = "Which layers hurt"
Sensitivity = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Measure what formats cost, by kl, quadratic, hawq-v2, fisher, error, …",
                 show_default=False, rich_help_panel=_MEASURE),
]  # fmt: skip
Data = Annotated[
    str | None,
    typer.Option("--calibration", metavar="PATH", help="What to measure on: pictures or text.", show_default=False,
                 rich_help_panel=_MEASURE),
]  # fmt: skip
Formats = Annotated[
    str | None,
    typer.Option("--options", metavar="FORMATS", help="Formats to measure (default: 2, 3, 4, 6 and 8 bits).",
                 show_default=False, rich_help_panel=_MEASURE),
]  # fmt: skip
Name = Annotated[
    str,
    typer.Option("--method", "-m", metavar="NAME", help="Whose weights are measured, where it solves layer by layer: "
                 "gptq, spqr, hqq, billm, lorc.", rich_help_panel=_MEASURE),
]  # fmt: skip
Report = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE.html", help="A report with plots.", show_default=False,
                 rich_help_panel=_MEASURE),
]  # fmt: skip
Scores = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where the score table is kept, to be measured once (default: beside the "
                 "output).", show_default=False, rich_help_panel=_MEASURE),
]  # fmt: skip


def inspect(
    folder: Folder,
    layers: Layers = False,
    coverage: Coverage = False,
    sensitivity: Sensitivity = None,
    calibration: Data = None,
    options: Formats = None,
    method: Name = "rtn",
    output: Report = None,
    force: Force = False,
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
    """Show what a folder holds, layer by layer.

    Of a quantized model: each layer's format, bits and output error, and why the rest was kept. Of any other model: the
    units it is visited in, its layers, and which norm feeds which layers. With `--sensitivity`: what formats would cost
    each part of it, and how sure that is.

    Examples:

        dither inspect vit-w4a4/

        dither inspect vit/ --coverage

        dither inspect vit/ --sensitivity hawq-v2 --calibration pictures/ -o which-hurts.html
    """
    if sensitivity is not None and calibration is None:
        raise typer.BadParameter("say what to measure on with --calibration DATA", param_hint="--calibration")
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        if sensitivity is not None:
            check_new([] if output is None else [Path(output)], force=force)
            scores = scores or scores_beside(output)
            how: dict[str, Any] = {"options": None if options is None else listed(options), "scores": scores}
            how |= {"method": method}
            how |= {"count": samples, "length": length, "batch_size": batch_size, "seed": seed}
            how |= {"workers": workers, "engine": engine, "ray_address": ray_address}
            _measure(terminal, folder, sensitivity, calibration, output, device=chosen_device(device), **how)
            return
        from dither.inspection import inspect as look

        data = look(folder, device=chosen_device(device) or "cpu")
        if data["kind"] == "compare":
            show_comparison(terminal, data, {})
            return
        if data["kind"] == "tune":
            show_search(terminal, data, {})
            return
        terminal.show(data)
        everything = layers == coverage
        if everything:
            _summary(terminal, data)
        if layers or everything:
            _layers(terminal, data)
        if coverage or everything:
            _coverage(terminal, data, in_full=coverage)


def _measure(
    terminal: Terminal, folder: str, sensitivity: str, calibration: str | None, output: str | None, **how: Any
) -> None:
    """The units with the worst first, and the report where one was asked for."""
    from dither.report.allocation import allocation_report, score_rows, scored_weights
    from dither.report.table import seconds
    from dither.sensitivity import measure

    with going_on(how["scores"]), terminal.progress(sensitivity) as progress:
        table = measure(folder, sensitivity, calibration, progress=progress, **how)
    data = allocation_report(table)
    terminal.show(data)
    rows = score_rows(table)
    terminal.table(
        rows, f"What formats such as {table.options[0]} cost, by {sensitivity}", tuple(rows[0])[1:], ("Weights",)
    )
    whose = scored_weights(table.facts)
    terminal.line(f"lower is better; weights: {whose}; measured in {seconds(table.facts.get('time_s'))}")
    if negative := table.facts.get("negative"):
        terminal.line(f"{len(negative)} layers have a negative trace, which counts as small: {', '.join(negative[:3])}")
    if output is not None:
        from dither.report.html import write_html

        terminal.line(f"report: {write_html(data, output)}")


def _summary(terminal: Terminal, data: dict[str, Any]) -> None:
    from dither.report.table import count, size, summary_rows

    model = data["model"]
    if data["kind"] == "quantize":
        terminal.line(f"{model['name']}: {model['class']}, quantized by {data['recipe'].get('method')}")
        rows = [(row["figure"], row["value"], row["note"]) for row in summary_rows(data)]
        terminal.table([{"": name, "Result": text, "Note": note} for name, text, note in rows])
        return
    terminal.line(f"{model['name']}: {model['class']}, not quantized")
    blocks = sum(unit["is_block"] for unit in data["units"])
    facts = {"Parameters": count(model["parameters"]), "Size": size(data["size_bytes"])}
    if data["probe"] is not None:
        facts["Units"] = f"{len(data['units'])}, {blocks} of them blocks; found by running {data['probe']}"
    terminal.table([{"": name, "Model": text} for name, text in facts.items()])
    if data["probe"] is None:
        terminal.line(
            "no input could be made up for it: units, links and coverage are known only with calibration data"
        )


def _layers(terminal: Terminal, data: dict[str, Any]) -> None:
    from dither.report.table import count, layer_rows

    if data["kind"] == "quantize":
        terminal.table(layer_rows(data), "Layers", ("Bits", "Output error"), ("Notes", "Shape"))
        return
    norm = {name: link["norm"] for link in data["links"] for name in link["layers"]}
    rows = [
        {
            "Layer": row["name"],
            "Kind": row["kind"],
            "Shape": "×".join(map(str, row["shape"])),
            "Parameters": count(row["parameters"]),
            "Fed by": norm.get(row["name"], "").removeprefix(row["unit"] + "."),
        }
        for row in data["layers"]
    ]
    terminal.table(rows, "Layers", ("Parameters",), ("Shape", "Kind"))


def _coverage(terminal: Terminal, data: dict[str, Any], *, in_full: bool) -> None:
    from dither.report.table import coverage_reasons, coverage_rows

    rows = coverage_rows(data) if in_full else coverage_reasons(data)
    if not rows:
        return
    if data["kind"] == "inspect":
        rows = [{key: text for key, text in row.items() if key != "Status"} for row in rows]
    terminal.table(rows, "Coverage", ("Modules", "Parameters"), ("Class",))
