"""Allocators that judge whole choices while they search: MixDQ, ViDiT-Q and dynamic programming with a beam."""

from typing import Any

from allocation_bench import Bench

from dither.allocation.allocation import Allocation
from dither.beam_search import NAME, allocate_by_beam
from dither.by_classes import WAYS, allocate_by_classes

SEARCHES = (*WAYS, NAME)


def searches(allocator: str) -> bool:
    """Whether an allocator is one of these; settings may follow its name."""
    return allocator.partition("+")[0] in SEARCHES


def searched(bench: Bench, allocator: str, seed: int, size: float) -> Allocation:
    """The allocation of a search within so many stored bits; classes are the pattern asked for and the rest."""
    parameters = sum(unit.parameters for unit in bench.table("error", seed).units)
    asked: dict[str, Any] = bench.asked(seed) | {"bits": size / parameters}
    if allocator in WAYS:
        pattern, _, scored = bench.given.by_class.partition("=")
        return allocate_by_classes(bench.given.model, bench.given.calibration, allocator, {pattern: scored}, **asked)[1]
    return allocate_by_beam(bench.given.model, bench.given.calibration, allocator, **asked)[1]
