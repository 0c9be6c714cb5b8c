"""The `dither` command: it parses, calls the library and prints; nothing is computed here."""

from dither.cli.application import app, main

__all__ = ["app", "main"]
