"""`dither tune`: try configurations of all methods on a model, and keep the best under a limit."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.options import (
    Calibration,
    Count,
    Debug,
    Device,
    Json,
    Length,
    Model,
    Quiet,
    RayAddress,
    Seed,
    chosen_device,
    listed,
)
from dither.cli.terminal import Terminal

_SEARCH, _SPACE = "The search", "What to choose among"
NUMBERS = ("Trial", "Accuracy", "Perplexity", "Kl", "Size", "Time", "Samples")
LESS = ("Time", "Search", "Scheme", "Samples", "Activations", "Granularity", "Ends")
SHOWN = 10  # trials in the table

Output = Annotated[
    str, typer.Option("--output", "-o", metavar="OUT", help="New folder for trials, report and the best result.",
                      show_default=False)
]  # fmt: skip
Data = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Pictures or text that judge trials (default: a part of --calibration).",
                 show_default=False),
]  # fmt: skip
Test = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Other data that only the best is evaluated on.", show_default=False),
]
Trials = Annotated[int, typer.Option(min=1, metavar="N", help="Configurations to measure.", rich_help_panel=_SEARCH)]
Aim = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="accuracy, perplexity, kl or size (default: what the data can tell).",
                 show_default=False, rich_help_panel=_SEARCH),
]  # fmt: skip
Limits = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="NAME=VALUE", help="A bound to keep: size=20MB, accuracy=0.85, perplexity=20, "
                 "kl=0.1; may be repeated.", show_default=False, rich_help_panel=_SEARCH),
]  # fmt: skip
Search = Annotated[str, typer.Option(metavar="NAME", help="xgboost, genetic, random or grid.", rich_help_panel=_SEARCH)]
Earlier = Annotated[
    list[str] | None,
    typer.Option("--from", metavar="TRIALS.jsonl", help="Trials of another model to learn from; may be repeated.",
                 show_default=False, rich_help_panel=_SEARCH),
]  # fmt: skip
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the search in OUT.", rich_help_panel=_SEARCH)]
Methods = Annotated[
    str,
    typer.Option(metavar="NAME,…", help="Methods; fields follow with +, as in gptq+damping=0.1 (default: all that "
                 "fit).", show_default=False, rich_help_panel=_SPACE),
]  # fmt: skip
Formats = Annotated[str, typer.Option(metavar="FORMAT,…", help="Formats.", rich_help_panel=_SPACE)]
Among = Annotated[
    list[str] | None,
    typer.Option("--try", metavar="DIMENSION=VALUE,…", help="Values of scheme (asym,sym,pow2), search (minmax,"
                 "percentile,mse), granularity (tensor,channel,g64), ends (quantized,int8,kept) or samples (8,32,128).",
                 show_default=False, rich_help_panel=_SPACE),
]  # fmt: skip
AtOnce = Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Trials at once, a process for each.")]
TrialEngine = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="Where `--workers` trials run at once: local or ray.")
]


def tune(
    model: Model,
    calibration: Calibration,
    output: Output,
    data: Data = None,
    test: Test = None,
    trials: Trials = 40,
    objective: Aim = None,
    limit: Limits = None,
    strategy: Search = "xgboost",
    earlier: Earlier = None,
    resume: Resume = False,
    methods: Methods = "",
    weights: Formats = "int4",
    activations: Formats = "none",
    among: Among = None,
    count: Count = None,
    length: Length = None,
    workers: AtOnce = 1,
    engine: TrialEngine = "local",
    ray_address: RayAddress = None,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search for the method, formats and calibration that suit a model best.

    Every trial quantizes the model and measures the result; it is written to OUT/trials.jsonl at once, so that a
    search that was interrupted goes on with --resume. OUT/best holds the best result with its recipe.

    Examples:

        dither tune vit/ --calibration train/ --test test/ --weights int3,int4,int8 --limit size=2.5MB -o tuned/

        dither tune vit/ --calibration train/ --data judge/ --methods gptq,erq --try ends=quantized,kept -o tuned/

        dither tune small/ --calibration train/ --from tuned/trials.jsonl --trials 10 -o tuned-small/
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.quantune.run import tune as run

        place = chosen_device(device)
        try:
            with terminal.progress("tuning") as progress:
                report = run(
                    model, calibration, output, data=data, test=test, trials=trials, objective=objective,
                    limits=limit or [], methods=listed(methods), weights=listed(weights),
                    activations=listed(activations), among=_among(among or []), strategy=strategy,
                    earlier=earlier or [], resume=resume, seed=seed, evaluate_count=count, length=length,
                    device=place, workers=workers, run_on=engine, ray_address=ray_address, progress=progress,
                )  # fmt: skip
        except KeyboardInterrupt as stop:
            if (Path(output) / "trials.jsonl").is_file():
                stop.add_note(f"finished trials are kept in {output!r}: repeat the command with --resume to go on")
            raise
        show_search(terminal, report.data, {"output": output})
        terminal.line(f"report: {Path(output) / 'report.html'}")


def _among(texts: list[str]) -> dict[str, list[str | int]]:
    """The values of each dimension; whole numbers as such."""
    given: dict[str, list[str | int]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not listed(values):
            raise typer.BadParameter(f"expected DIMENSION=VALUE,… got {text!r}", param_hint="--try")
        given[name.strip()] = [int(value) if value.isdigit() else value for value in listed(values)]
    return given


def show_search(terminal: Terminal, data: dict[str, Any], extra: dict[str, Any]) -> None:
    """The best trials, what the best of them gives, and how to make it again."""
    from dither.report.tune import summary, trial_rows

    terminal.show({**data, **extra})
    rows = trial_rows(data, ranked=True)
    terminal.table(rows[:SHOWN], f"{data['model']['name']}, the best of {len(rows)} trials", NUMBERS, LESS)
    terminal.table([{"": row["figure"], "Best": row["value"], "Note": row["note"]} for row in summary(data)])
    for text in data["notes"]:
        terminal.line(f"note: {text}")
    if data["best"] is None:
        terminal.line("no trial kept the limits")
        return
    terminal.line(f"the best is saved in {data['best']['folder']}")
    if data["best"]["command"] is not None:
        terminal.line(f"the same again: {data['best']['command']}")
