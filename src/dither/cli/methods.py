"""`dither methods`: what there is to choose from."""

from typing import Annotated, Any

import typer

from dither.cli.options import Debug, Device, Json, Quiet, Seed
from dither.cli.terminal import Terminal

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one in full.", show_default=False)]


def methods(
    name: Name = None,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the methods, or show one with its fields, defaults and source.

    Fields are set with `dither quantize --set FIELD=VALUE`, or in a recipe file.

    Examples:

        dither methods

        dither methods erq
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.catalog import catalog, describe_method

        if name is None:
            found = catalog()
            terminal.show({"schema": 1, "kind": "methods", "methods": found})
            rows = [{"Method": row["name"], "What it does": row["summary"], "Source": row["source"]} for row in found]
            terminal.table(rows)
            terminal.line("dither methods NAME shows one with its fields")
            return
        method = describe_method(name)
        terminal.show({"schema": 1, "kind": "method", **method})
        terminal.line(method["doc"])
        for title, own in ((f"Fields of {name}", True), ("Fields of every method", False)):
            terminal.table([_row(field) for field in method["fields"] if field["own"] is own], title)


def _row(field: dict[str, Any]) -> dict[str, str]:
    default = field["default"]
    text = str(default).lower() if isinstance(default, bool) else "" if default in ([], {}) else str(default)
    return {"Field": field["name"], "Takes": field["type"], "Default": text, "Meaning": field["description"]}
