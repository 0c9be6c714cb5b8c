"""`dither demo`: the main job on a small model and pictures that come with the package."""

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.compare import FILES, prepare, show_comparison
from dither.cli.options import Debug, Device, Json, Quiet, Seed, chosen_device
from dither.cli.terminal import Terminal

if TYPE_CHECKING:
    from dither.result import Result

DATA = Path(__file__).parents[1] / "demo_data"
FOLDER = "dither-demo"
KEPT = "erq"  # the method whose result is saved

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="DIR", help=f"Folder for the result (default: a new {FOLDER}).",
                 show_default=False),
]  # fmt: skip


def demo(
    output: Output = None,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a small vision transformer to 3-bit weights and 4-bit activations, by rounding and by ERQ.

    Model and pictures come with the package. The result, the table and the report go into a new folder.

    Examples:

        dither demo

        dither demo -o somewhere/
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.comparison import compare

        place = chosen_device(device)
        folder = Path(output) if output is not None else _unused()
        prepare(folder)
        saved = folder / f"vit-{KEPT}"

        def save(label: str, _seed: int, result: "Result") -> None:
            if label == KEPT:
                result.save(saved)

        with terminal.progress("demo") as progress:
            report = compare(
                DATA / "vit_tiny", ["rtn", KEPT], DATA / "cifar10" / "calibration", DATA / "cifar10" / "test",
                weights=["int3"], activations=["int4"], seed=seed, device=place, progress=progress, finished=save,
            )  # fmt: skip
        for name in FILES:
            report.save(folder / name)
        show_comparison(terminal, report.data, {"output": str(folder), "saved": str(saved)})
        terminal.line(f"the {KEPT} model: {saved} (try: dither inspect {saved})")
        terminal.line(f"report: {folder / 'report.html'}")


def _unused() -> Path:
    """The demo's folder in the current one, with a number if there is one from before."""
    names = (Path(FOLDER if number == 1 else f"{FOLDER}-{number}") for number in count(1))
    return next(folder for folder in names if not folder.exists())
