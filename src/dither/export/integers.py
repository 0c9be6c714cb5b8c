"""Weights as other programs' integer formats hold them, and a reason for each weight that those cannot hold."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dither.errors import SpecError
from dither.formats.grid import Grid
from dither.formats.qtensor import QTensor

INSTEAD = "open the folder with from_pretrained after `import dither`, or export --to dequantized"


@dataclass(frozen=True)
class IntegerWeight:
    """real = scale * (code - zero_point), with one scale and zero-point for `group_size` columns of a row.

    `group_size` is None for one a row; then both are [o, 1]. A weight with one scale in all has equal rows.
    """

    codes: UInt8[Tensor, "o i"]
    scale: Float[Tensor, "o g"]
    zero_point: Int[Tensor, "o g"]
    bits: int
    group_size: int | None
    symmetric: bool
    per_tensor: bool

    def grouped(self, size: int) -> "IntegerWeight":
        """The same weight with groups of `size` columns, which must divide the groups there are."""
        columns = self.codes.shape[1]
        times = -(-columns // size) if self.group_size is None else self.group_size // size
        scale, zero = (part.repeat_interleave(times, dim=1) for part in (self.scale, self.zero_point))
        return IntegerWeight(self.codes, scale, zero, self.bits, size, self.symmetric, False)


def refused(layer: str, target: str, reason: str) -> SpecError:
    """The error of a layer that a format cannot hold."""
    return SpecError(f"{layer}: {target} cannot hold {reason}; {INSTEAD}")


def integer_weight(layer: str, weight: QTensor, target: str, bits: tuple[int, ...]) -> IntegerWeight:
    """The weight as plain integers of one of these widths; `layer` and `target` name the culprits of a refusal.

    Raises:
        SpecError: the format cannot hold the weight; the message says why and what to do.
    """
    grid, spec = weight.grid, weight.spec
    extra = _extra(weight)
    if extra is not None or not isinstance(grid, Grid):
        raise refused(layer, target, extra or f"the levels of {spec}, which are no uniform grid")
    if spec.kind not in ("int", "mxint"):
        raise refused(layer, target, f"the levels of {spec}, which are no uniform grid")
    if spec.dual:
        raise refused(layer, target, f"the two grids a row of {spec}")
    if spec.granularity == "group" and spec.group_along == "outputs":
        raise refused(layer, target, f"groups along the outputs ({spec})")
    if spec.bits not in bits:
        widths = ", ".join(map(str, bits))
        raise refused(layer, target, f"{spec.bits}-bit codes ({spec}): it has {widths} bits")
    zero = grid.zero_point
    if not torch.equal(zero, zero.round()):
        raise refused(layer, target, f"zero-points that are no integers ({spec})")
    if bool((zero < 0).any()) or bool((zero > 2**spec.bits - 1).any()):
        raise refused(layer, target, f"zero-points outside of the codes ({spec}: 'tight' ranges need 'clampzero')")
    rows = weight.shape[0]
    scale, zero = (part.expand(rows, -1).contiguous() for part in (grid.scale.float(), zero.to(torch.int32)))
    symmetric = bool((zero == 2 ** (spec.bits - 1)).all()) and spec.symmetry == "sym"
    size = spec.group_size if spec.granularity == "group" else None
    return IntegerWeight(weight.codes, scale, zero, spec.bits, size, symmetric, spec.granularity == "tensor")


def _extra(weight: QTensor) -> str | None:
    """What is stored beside codes, in words."""
    if weight.sparse is not None:
        return "the sparse outliers beside the codes"
    return None if weight.low_rank is None else "the low-rank term beside the codes"
