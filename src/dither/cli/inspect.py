"""`dither inspect`: layer by layer, what was done to a model or could be."""

from typing import Annotated, Any

import typer

from dither.cli.compare import show_comparison
from dither.cli.options import Debug, Device, Json, Quiet, Seed, chosen_device
from dither.cli.terminal import Terminal
from dither.cli.tune import show_search

Folder = Annotated[
    str, typer.Argument(metavar="OUT_OR_MODEL", help="Folder of a model, quantized or not.", show_default=False)
]
Layers = Annotated[bool, typer.Option("--layers", help="Only the layers.")]
Coverage = Annotated[bool, typer.Option("--coverage", help="Only what is quantized or kept, module by module.")]


def inspect(
    folder: Folder,
    layers: Layers = False,
    coverage: Coverage = False,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a folder holds, layer by layer.

    Of a quantized model: each layer's format, bits and output error, and why the rest was kept. Of any other model: the
    units it is visited in, its layers, and which norm feeds which layers.

    Examples:

        dither inspect vit-w4a4/

        dither inspect vit/ --coverage
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
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
