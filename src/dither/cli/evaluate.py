"""`dither evaluate`: how right a model is, and how faithful to the one it was made from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli.options import Count, Debug, Device, Json, Quiet, Seed, chosen_device, listed
from dither.cli.terminal import Terminal

if TYPE_CHECKING:
    from dither.evaluation.harness import Tasks

Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder of a model, quantized or not.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="What to evaluate on. Pictures: a folder, .npz or .csv; text: .txt or .jsonl.",
        show_default=False,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The full-precision model (default: what OUT was made from).",
                 show_default=False),
]  # fmt: skip
Length = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Tokens of a window of text (default: 1024).", show_default=False),
]
Names = Annotated[
    str,
    typer.Option(metavar="NAME,…", help="Tasks of lm-eval to run too (the extra dither[lm-eval]).", show_default=False),
]
TaskFolder = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Task files of your own, as lm-eval reads them.", show_default=False),
]
TaskCount = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Examples of each task (default: all).", show_default=False),
]


def evaluate(
    out: Out,
    data: Data,
    reference: Reference = None,
    count: Count = None,
    length: Length = None,
    tasks: Names = "",
    task_folder: TaskFolder = None,
    task_count: TaskCount = None,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on pictures or on text.

    Top-1 needs labels: folders named by class, or labels in the .npz or .csv. Text gives perplexity, over windows that
    do not overlap. Agreement, KL and SQNR compare with the full-precision model and need no labels.

    Examples:

        dither evaluate vit-w4a4/ --data pictures/

        dither evaluate vit-w4a4/ --data test.npz --reference vit/ --count 1000 --json

        dither evaluate llama-w4/ --data test.txt --length 2048

        dither evaluate llama-w4/ --data test.txt --tasks arc_easy,piqa --task-count 200
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.evaluation.evaluate import evaluate as measure
        from dither.evaluation.harness import open_tasks
        from dither.report.table import summary_rows

        place = chosen_device(device)
        against = reference or source_of(out)
        known = open_tasks(listed(tasks), task_folder, task_count) if listed(tasks) else None
        with terminal.progress("evaluating") as progress:
            found = measure(
                out, data, reference=against, count=count, seed=seed, length=length, device=place, progress=progress
            ).to_json()
        result: dict[str, Any] = {"schema": 1, "kind": "evaluate", "model": out, "reference": against, **found}
        if known is not None:
            result["tasks"] = _run(out, against, known, place)
        terminal.show(result)
        rows = summary_rows({"kind": "quantize", "evaluation": found})
        terminal.table([{"": row["figure"], "Result": row["value"], "Note": row["note"]} for row in rows])
        if known is not None:
            terminal.table([_task_row(one) for one in result["tasks"]], "", ("Result", "Full precision"))
        if against is None:
            terminal.note("agreement, KL and SQNR need the full-precision model: add --reference MODEL")


def _run(out: str, against: str | None, tasks: "Tasks", device: str | None) -> list[dict[str, Any]]:
    """Figures of lm-eval, of both models where there are two."""
    import torch

    from dither.evaluation.harness import run_tasks
    from dither.models.network import open_network

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    whole = None if against is None else open_network(against, place)
    return [one.to_json() for one in run_tasks(open_network(out, place), tasks, whole)]


def _task_row(figure: dict[str, Any]) -> dict[str, str]:
    """A figure as text."""
    from dither.report.table import fixed

    error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.4f}"
    return {
        "Task": figure["task"],
        "Figure": figure["metric"],
        "Result": fixed(figure["value"], 4) + error,
        "Full precision": fixed(figure["reference"], 4),
    }


def source_of(out: str) -> str | None:
    """The folder that OUT was made from, if its report names one that is still there."""
    from dither.errors import PathError
    from dither.report.data import read_report

    try:
        source = read_report(Path(out)).get("model", {}).get("source")
    except PathError:
        return None
    return source if isinstance(source, str) and (Path(source) / "config.json").is_file() else None
