"""allocate: which bits where in a model, within a budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dither.allocation.allocation import Allocation
from dither.allocation.solve import solve
from dither.allocation.table import SIZE, ScoreTable
from dither.errors import InputError, nearest
from dither.sensitivities import SENSITIVITIES
from dither.sensitivity import measure


@dataclass(frozen=True)
class Allocator:
    """A published way to allocate: what it measures, and how it chooses."""

    sensitivity: str
    solver: str = "milp"
    about: str = ""


CPTQUANT = ("cmpq", "pmpq", "tdmpq")
ALLOCATORS: dict[str, Allocator] = {
    **{name: Allocator(name) for name in SENSITIVITIES},
    "hawq-v2-monotone": Allocator("hawq-v2", "hawq-v2", "as published: bits fall with the mean trace"),
    "augmented": Allocator("augmented", "pairwise", "second order with couplings, local search by flips and swaps"),
    **{f"{name}-clusters": Allocator(name, "clusters", "as published: clusters of blocks") for name in CPTQUANT},
    "zeroq": Allocator("kl", "dp", "KL of one unit at a time, dynamic programming"),
}


def allocator_named(text: str) -> Allocator:
    """The allocator of a name, to which settings of its sensitivity may be added: `hawq-v2+probes=20`.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    name, plus, settings = text.strip().partition("+")
    if name not in ALLOCATORS:
        raise InputError(f"unknown allocator {name!r}{nearest(name, ALLOCATORS)} (known: {', '.join(ALLOCATORS)})")
    found = ALLOCATORS[name]
    return Allocator(found.sensitivity + plus + settings, found.solver, found.about)


def allocate(
    model: str | Path | nn.Module | ScoreTable,
    calibration: Any = None,
    *,
    bits: float | None = None,
    size: float | None = None,
    limits: Mapping[str, float] | None = None,
    by: str = "fisher",
    solver: str | None = None,
    **how: Any,
) -> Allocation:
    """The formats of least harm within budgets, for a model or for a table that was measured already.

    `bits` a weight on average over the layers that are quantized, or `size` bytes of the whole model; scales and all
    else that is stored count. `limits` are budgets of other resources, such as `bops`. `by` names an allocator, whose
    solver `solver` replaces; `how` is as in `measure`.

    Raises:
        InputError: no budget, or one that cannot be met; the message says what can.
    """
    chosen = allocator_named(by)
    if isinstance(model, ScoreTable):
        table = model
    else:
        table = measure(model, chosen.sensitivity, calibration, **how)
    return solve(table, budgets(table, bits, size, limits), solver or chosen.solver)


def budgets(
    table: ScoreTable, bits: float | None, size: float | None, limits: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Budgets by resource from what a user asks for; of bits and size the smaller counts.

    Raises:
        InputError: nothing was asked for, or what is fixed takes all of the size.
    """
    found = {name: float(limit) for name, limit in (limits or {}).items()}
    asked = [] if bits is None else [table.size_for_bits(float(bits))]
    asked += [] if size is None else [table.size_for_bytes(float(size))]
    if SIZE in found:
        asked.append(table.size_for_bytes(found[SIZE]))
    if asked:
        found[SIZE] = min(asked)
    if not found:
        raise InputError("an allocation needs a budget: bits a weight, a size in bytes, or a limit of another resource")
    return found
