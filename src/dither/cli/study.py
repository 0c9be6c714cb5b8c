"""`dither study`: what quantization does to the texts that a model writes, and weights against activations."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.compare import Calibration, Data, prepare
from dither.cli.options import Count, Debug, Device, Json, Length, Quiet, Samples, Seed, chosen_device, listed
from dither.cli.terminal import Terminal

app = typer.Typer(no_args_is_help=True, help="Studies of what quantization does.", rich_markup_mode="markdown")
NUMBERS = (
    "Bits", "Size", "Peak memory", "Tokens a second", "Temperature", "Top-k", "New tokens", "Texts", "Agreement",
    "Same start", "Perplexity", "Distinct 1", "Distinct 2", "Distinct 3", "Repetition",
)  # fmt: skip
LESS = ("Texts", "Distinct 1", "Distinct 3", "Same start", "Top-k")

Folder = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a language model.", show_default=False)]
Formats = Annotated[
    str,
    typer.Option(metavar="FORMAT,…", help="WEIGHTS or WEIGHTS/ACTIVATIONS (default: nf4, fp4, both with quantized "
                 "scales, int8); the full-precision model is always there.", show_default=False),
]  # fmt: skip
Values = Annotated[str, typer.Option(metavar="X,…", show_default=False)]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Prompts, one a line (default: ten of dither's own).", show_default=False),
]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="Texts for each prompt and setting.")]
Type = Annotated[
    str, typer.Option(metavar="TYPE", help="What all compute in: float32, bfloat16 or float16; auto asks the device.")
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="DIR", help="Folder for report.html and report.json.", show_default=False),
]


@app.callback()
def _study() -> None:
    """Studies of what quantization does."""


@app.command()
def generation(
    model: Folder,
    formats: Formats = "",
    temperatures: Values = "",
    max_new_tokens: Values = "",
    top_k: Values = "",
    prompts: Prompts = None,
    seeds: Seeds = 3,
    dtype: Type = "auto",
    output: Output = None,
    json: Json = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let a model write in several formats, at several temperatures, lengths and top-k, and compare the texts.

    Examples:

        dither study generation llama/ -o study/

        dither study generation llama/ --formats nf4:g64,int8:sym/int8:token:sym --temperatures 0,0.5,1 --seeds 1
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither import study

        place = chosen_device(device) or "cpu"
        knobs = study.Knobs(
            _numbers(temperatures, float) or study.TEMPERATURES, _numbers(max_new_tokens, int) or study.LENGTHS,
            _numbers(top_k, int) or study.TOP_K, seeds,
        )  # fmt: skip
        if output is not None:
            prepare(Path(output))
        with terminal.progress("writing") as progress:
            report = study.study_generation(
                model, listed(formats) or study.FORMATS, _prompts(prompts) or study.PROMPTS, knobs,
                device=place, dtype=_dtype(dtype, place), progress=progress,
            )  # fmt: skip
        if output is not None:
            for name in ("report.html", "report.json"):
                report.save(Path(output) / name)
        _show(terminal, report.data, output)


@app.command()
def grid(
    model: Folder,
    data: Data,
    calibration: Calibration = None,
    methods: Annotated[str, typer.Option(metavar="NAME,…", help="Methods (default: rtn,gptq).")] = "",
    weights: Annotated[str, typer.Option(metavar="FORMAT,…", help="Formats of weights.", show_default=False)] = "",
    activations: Annotated[
        str,
        typer.Option(
            metavar="FORMAT,…", help="Formats of inputs of linear layers; none keeps them.", show_default=False
        ),
    ] = "",
    samples: Samples = None,
    length: Length = None,
    count: Count = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows that are in --output.")] = False,
    output: Output = None,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize weights, activations and both, by several methods and formats, and show which loses what.

    Examples:

        dither study grid llama/ --data text.txt -o grid/

        dither study grid llama/ --data test.txt --weights int8,int4:g64 --activations none,int8:token
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither import grid_study
        from dither.report.grid import grid_markdown, grid_rows
        from dither.storage import write_text

        if output is not None:
            prepare(Path(output))
        with terminal.progress("studying") as progress:
            report = grid_study.study_grid(
                model, listed(methods) or grid_study.METHODS, calibration, data,
                weights=listed(weights) or grid_study.WEIGHTS,
                activations=listed(activations) or grid_study.ACTIVATIONS,
                seed=seed, count=samples, evaluate_count=count, length=length, device=chosen_device(device),
                output=output, resume=resume, progress=progress,
            )  # fmt: skip
        if output is not None:
            for name in ("report.html", "report.json"):
                report.save(Path(output) / name)
            write_text(grid_markdown(report.data), Path(output) / "report.md")
        terminal.show(report.data)
        rows = grid_rows(report.data)
        terminal.table(rows, report.data["model"]["name"], tuple(rows[0])[2:] if rows else ())
        for failure in report.data["failures"]:
            terminal.line(f"failed: {failure['method']}: {failure['error']}")
        if output is not None:
            terminal.line(f"report: {Path(output) / 'report.html'}")


def _show(terminal: Terminal, data: dict[str, Any], output: str | None) -> None:
    from dither.report.study import format_rows, study_rows

    terminal.show(data)
    terminal.table(format_rows(data), data["model"]["name"], NUMBERS)
    terminal.table(study_rows(data), "", NUMBERS, LESS)
    if output is not None:
        terminal.line(f"report: {Path(output) / 'report.html'}")


def _numbers(text: str, kind: type) -> tuple[Any, ...]:
    from dither.errors import InputError

    try:
        return tuple(kind(part) for part in listed(text))
    except ValueError:
        raise InputError(f"expected numbers with commas between them, got {text!r}") from None


def _prompts(path: str | None) -> list[str]:
    from dither.errors import PathError

    if path is None:
        return []
    if not Path(path).is_file():
        raise PathError(f"prompts: {path!r} does not exist")
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _dtype(text: str, device: str) -> Any:
    import torch

    from dither.errors import InputError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if text not in known:
        raise InputError(f"expected --dtype to be auto, {', '.join(known)}, got {text!r}")
    return known[text]
