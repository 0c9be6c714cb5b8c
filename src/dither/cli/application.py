"""The commands together. torch and transformers are imported inside the commands, so that help comes at once."""

from importlib.metadata import version
from typing import Annotated

import typer

from dither.cli.allocate import allocate
from dither.cli.compare import compare
from dither.cli.demo import demo
from dither.cli.evaluate import evaluate
from dither.cli.export import export
from dither.cli.generate import generate
from dither.cli.inspect import inspect
from dither.cli.methods import methods
from dither.cli.quantize import quantize
from dither.cli.requantize import requantize
from dither.cli.study import app as study
from dither.cli.tune import tune

app = typer.Typer(
    name="dither",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"dither {version('dither')}")
        raise typer.Exit
    return asked


@app.callback()
def _dither(
    asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Store a trained network in few bits with the least loss.

    Begin with `dither demo`; then `dither COMMAND --help` shows each command with examples.
    """


for command in (
    demo, quantize, allocate, requantize, export, generate, evaluate, compare, tune, inspect, methods,
):  # fmt: skip
    app.command()(command)
app.add_typer(study, name="study")


def main() -> None:
    """The `dither` command."""
    app()
