"""`dither requantize`: a model that is quantized already, in another scheme."""

from typing import Annotated, Any

import typer

from dither.cli.options import Debug, Json, Quiet
from dither.cli.terminal import Terminal

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A quantized ONNX model (QDQ form), or a folder of dither's.", show_default=False
    ),
]
To = Annotated[
    str,
    typer.Option(metavar="SCHEME", help="int8:tensor, int8:channel, either with :pow2 for power-of-two scales.",
                 show_default=False),
]  # fmt: skip
File = Annotated[
    str, typer.Option("--output", "-o", metavar="FILE", help="New .onnx file, or folder.", show_default=False)
]


def requantize(
    model: Model,
    to: To,
    output: File,
    correct: Annotated[
        bool, typer.Option("--correct/--no-correct", help="Choose weight scales of least error, not the extremes.")
    ] = True,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Fold mean rounding errors into biases, layer by layer.")
    ] = True,
    signed: Annotated[
        bool, typer.Option("--signed", help="Store activations that are never negative as signed, too.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Change the scheme of a model that is quantized already, by another tool or by dither, without data.

    The new scheme has no zero-points, and power-of-two scales if you like. Ranges come with the model. The result is
    compared with the quantized model that it came from.

    Examples:

        dither requantize mobilenet-uint8.onnx --to int8:tensor:pow2 -o mobilenet-pow2.onnx

        dither requantize resnet-int8/ --to int8:tensor:pow2 -o resnet-pow2/
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.export.onnx_packages import check_packages

        check_packages()
        from dither.export.requantize import requantize as run

        with terminal.progress(f"to {to}") as progress:
            report = run(
                model, to, output, correct_weights=correct, fold_errors=fold, unsigned=not signed, progress=progress
            )
        terminal.show(report)
        _show(terminal, report)


def _show(terminal: Terminal, report: dict[str, Any]) -> None:
    from dither.report.table import count, significant, size

    terminal.line(
        f"{count(report['layers'])} layers and {count(report['activations'])} activations in {report['to']}, "
        f"{size(report['size_bytes'])} (before: {size(report['source_size_bytes'])})"
    )
    terminal.line(
        f"on {report['pictures']} drawn pictures {100 * report['agreement']:.0f} % of the answers are the source's; "
        f"outputs differ by {significant(report['difference'])} of their spread"
    )
    for note in report["notes"]:
        terminal.line(f"note: {note}")
    terminal.line(f"saved in {report['output']}")
