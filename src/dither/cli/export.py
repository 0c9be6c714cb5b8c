"""`dither export`: a quantized model in the form that another runtime opens."""

from typing import Annotated, Any

import typer

from dither.cli.options import Debug, Json, Quiet
from dither.cli.terminal import Terminal

Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder that `dither quantize` wrote.", show_default=False)]
To = Annotated[
    str,
    typer.Option(metavar="FORM", help="compressed-tensors, gptq, gptq-v2, gguf, onnx, onnx-qdq or dequantized.",
                 show_default=False),
]  # fmt: skip
Folder = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="New folder for the export.", show_default=False)
]
Type = Annotated[
    str,
    typer.Option(
        metavar="TYPE", help="float16, bfloat16 or float32 for scales and kept tensors; auto rounds no scale."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Pictures to compare the runtime's answers on (onnx-qdq).", show_default=False),
]
Ranges = Annotated[
    str | None,
    typer.Option("--calibration", metavar="PATH", help="Pictures that give residual sums of convolutions ranges "
                 "(onnx-qdq): these are integers then, faster, and answers move a little.", show_default=False),
]  # fmt: skip


def export(
    out: Out,
    to: To,
    output: Folder,
    dtype: Type = "auto",
    data: Data = None,
    calibration: Ranges = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a quantized model for vLLM, SGLang, llama.cpp, ONNX Runtime or plain transformers.

    Codes and scales are carried over as they are, then decoded from the new files and compared with OUT. What a form
    cannot hold is refused, with the layer and the reason.

    Examples:

        dither export llama-int4/ --to compressed-tensors -o llama-int4-ct/

        dither export llama-int4/ --to gguf -o llama-int4-gguf/

        dither export vit-int8/ --to onnx-qdq --data pictures/ -o vit-int8-onnx/
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.export.export import export as run

        with terminal.progress(f"to {to}") as progress:
            report = run(out, to, output, dtype=dtype, data=data, calibration=calibration, progress=progress)
        terminal.show(report)
        _show(terminal, report)


def _show(terminal: Terminal, report: dict[str, Any]) -> None:
    from dither.report.table import count, significant, size

    files = [{"File": file["name"], "Size": size(file["size_bytes"])} for file in report["files"]]
    terminal.table(files, f"{report['source']} as {report['to']}", ("Size",))
    change = report["largest_change"]
    same = "every weight decodes to the same values" if change == 0 else (
        f"weights moved by at most {significant(change)} of their largest, rounded to {report['dtype']}"
    )  # fmt: skip
    terminal.line(f"{count(report['layers'])} layers read back: {same}")
    for note in report["notes"]:
        terminal.line(f"note: {note}")
    if "pictures" in report:
        terminal.line(_answers(report["pictures"]))
    terminal.line(f"opens with {report['opens_with']}; saved in {report['output']}")


def _answers(pictures: dict[str, Any]) -> str:
    """What the runtime said of the pictures, beside dither's own answers."""
    accuracy = ""
    if pictures["top1"] is not None:
        accuracy = f"; top-1 {100 * pictures['top1']:.2f} %, dither's {100 * pictures['simulated_top1']:.2f} %"
    same = 100 * pictures["agreement"]
    return f"{pictures['count']} pictures: {same:.2f} % of the answers are dither's own{accuracy}"
