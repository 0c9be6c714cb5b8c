"""Choosing layers by name or pattern, and refusing patterns that choose nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from dither.errors import InputError, nearest
from dither.models.anatomy import Anatomy


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern (`*` and `?` as in file names) chooses.

    Raises:
        InputError: none; the message names the nearest.
    """
    if pattern in names:  # an allocation names every layer, and thousands of patterns are slow
        return [pattern]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise InputError(f"pattern {pattern!r} matches no layer{nearest(pattern, names)} (there are {len(names)})")
    return found


def without(anatomy: Anatomy, patterns: Iterable[str]) -> Anatomy:
    """The anatomy with the chosen layers kept in full precision."""
    skipped: dict[str, str] = {}
    for pattern in patterns:
        skipped |= dict.fromkeys(matching(pattern, anatomy.layers), f"skipped by {pattern!r}")
    units = [replace(unit, layers=tuple(name for name in unit.layers if name not in skipped)) for unit in anatomy.units]
    return replace(anatomy, units=tuple(unit for unit in units if unit.layers), kept=anatomy.kept | skipped)
