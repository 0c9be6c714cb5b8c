"""`dither compare`: which method is best for this model, at these bits, on these pictures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.options import (
    Count,
    Debug,
    Device,
    Json,
    Length,
    Model,
    Quiet,
    Samples,
    Seed,
    Workers,
    chosen_device,
    listed,
)
from dither.cli.terminal import Terminal

NUMBERS = ("Bits", "Size", "Top-1", "Perplexity", "Agreement", "KL", "SQNR dB", "Time", "Seeds")
LESS = ("Seeds", "Time", "KL", "Bits", "Size", "SQNR dB")  # what a narrow terminal goes without, in this order
FILES = ("report.html", "report.json")

Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="What to calibrate on (default: the first four fifths of --data, if that is text).",
        show_default=False,
    ),
]  # fmt: skip
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "--evaluate",
        metavar="PATH",
        help="Pictures or text to evaluate on, none of it in --calibration.",
        show_default=False,
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        metavar="NAME,…",
        help="Methods; fields follow with +, as in gptq+reparameterize=true or squeezellm+weights=nuq3.",
    ),
]
Formats = Annotated[
    str, typer.Option(metavar="FORMAT,…", help="Formats, each tried with each of the others.", show_default=False)
]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="Calibration draws for each method, from --seed on.")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="DIR", help="Folder for report.html and report.json.", show_default=False),
]


def compare(
    model: Model,
    data: Data,
    calibration: Calibration = None,
    methods: Methods = "rtn,gptq,repq,erq",
    weights: Formats = "",
    activations: Formats = "",
    seeds: Seeds = 1,
    samples: Samples = None,
    length: Length = None,
    count: Count = None,
    output: Output = None,
    workers: Workers = 1,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model with several methods and show which loses least.

    A run that fails is named below the table; the others go on.

    Examples:

        dither compare vit/ --calibration train/ --data test/ --weights int4,int3 --activations int4

        dither compare llama/ --methods rtn,gptq,awq,squeezellm+weights=nuq3 --weights int3:g64 --data text.txt

        dither compare vit/ --methods gptq,erq --seeds 5 --calibration train/ --data test/ -o report/
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.comparison import compare as run

        place = chosen_device(device)
        if output is not None:
            prepare(Path(output))
        with terminal.progress("comparing") as progress:
            report = run(
                model, listed(methods), calibration, data, weights=listed(weights), activations=listed(activations),
                seeds=seeds, seed=seed, count=samples, length=length, evaluate_count=count, device=place,
                workers=workers, progress=progress,
            )  # fmt: skip
        if output is not None:
            for name in FILES:
                report.save(Path(output) / name)
        show_comparison(terminal, report.data, {} if output is None else {"output": output})
        if output is not None:
            terminal.line(f"report: {Path(output) / 'report.html'}")


def prepare(folder: Path) -> None:
    """Make the folder of a report before the work begins.

    Raises:
        InputError: there is a report already.
        StorageError: it cannot be made.
    """
    from dither.errors import InputError
    from dither.storage import writing

    found = next((name for name in FILES if (folder / name).exists()), None)
    if found is not None:
        raise InputError(f"{str(folder)!r} holds a {found} already; choose another folder with --output")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def show_comparison(terminal: Terminal, data: dict[str, Any], extra: dict[str, Any]) -> None:
    """The comparison's table and what failed.

    Raises:
        DitherError: every run failed.
    """
    from dither.errors import DitherError
    from dither.report.data import mixed_activations
    from dither.report.table import compare_rows, count, fixed, percent, size

    failures = data["failures"]
    if not data["runs"]:
        raise DitherError(
            f"all {len(failures)} runs failed; the first, {failures[0]['method']}: {failures[0]['error']}"
        )
    terminal.show({**data, **extra})
    reference, inputs = data["reference"], count(data["evaluation"]["count"])
    terminal.table(compare_rows(data), f"{data['model']['name']}, {inputs} inputs", NUMBERS, LESS)
    top1 = "" if reference["top1"] is None else f"top-1 {percent(reference['top1'])}, "
    words = "" if reference.get("perplexity") is None else f"perplexity {fixed(reference['perplexity'])}, "
    terminal.line(f"full precision: {top1}{words}{size(reference['size_bytes'])}")
    if warning := mixed_activations(data):
        terminal.note(warning)
    for failure in failures:
        terminal.line(f"failed: {failure['method']} seed {failure['seed']}: {failure['error']}")
