"""QTensor: a weight as it is stored: codes on a grid, outliers and a correction, with its bytes counted honestly."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.codebook import Codebook
from dither.formats.grid import Grid, column_index, highest_code, implied_zero_point, row_index
from dither.formats.layout import Layout, packs_zero_point
from dither.formats.low_rank import LowRank
from dither.formats.packing import pack, unpack
from dither.formats.ranges import EXPONENT_BIAS, scale_dtype
from dither.formats.sparse import Sparse
from dither.formats.spec import QuantSpec


@dataclass(frozen=True)
class QTensor:
    """Codes [o, i] of at most 8 bits, the grid that gives them their values, and what is added to these."""

    codes: UInt8[Tensor, "o i"]
    grid: Grid | Codebook
    sparse: Sparse | None = None
    low_rank: LowRank | None = None

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        return self.grid.spec

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def layout(self) -> Layout:
        """What its stored tensors look like."""
        outliers = None if self.sparse is None else self.sparse.count
        low_rank = None if self.low_rank is None else (self.low_rank.rank, self.low_rank.dtype)
        return Layout(self.spec, self.shape, outliers, low_rank)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The values that the codes stand for, plus outliers and correction; computed in float32."""
        dense = self.grid.decode(self.codes.float())
        if self.sparse is not None:
            dense = dense + self.sparse.dense()
        if self.low_rank is not None:
            dense = dense + self.low_rank.dense()
        return dense.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes, scales or levels, zero-points, column sets, outliers, correction."""
        return self.layout.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, everything included."""
        return 8 * self.nbytes / self.codes.numel()

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors by their short names; `layout` says their shapes."""
        parts = {"codes": pack(self.codes, self.spec.bits), **_pack_grid(self.grid)}
        if self.spec.dual and self.grid.column_of is not None:
            parts["column_set"] = pack((self.grid.column_of % 2).to(torch.uint8)[None], bits=1)[0]
        for extra in (self.sparse, self.low_rank):
            parts |= {} if extra is None else extra.pack()
        return parts

    @classmethod
    def unpack(cls, parts: dict[str, Tensor], layout: Layout) -> "QTensor":
        """The inverse of `pack`.

        Raises:
            ShapeError: a stored tensor is missing or has another shape than the layout says.
        """
        spec, shape = layout.spec, layout.shape
        for name, (size, dtype) in layout.tensors().items():
            if name not in parts or parts[name].shape != size or parts[name].dtype != dtype:
                found = f"{tuple(parts[name].shape)} {parts[name].dtype}" if name in parts else "nothing"
                raise ShapeError(f"stored {name} of {spec} for weight {shape}: expected {size} {dtype}, got {found}")
        sparse = None if layout.outliers is None else Sparse.unpack(parts, shape)
        low_rank = None if layout.low_rank is None else LowRank.unpack(parts, layout.low_rank[1])
        return cls(unpack(parts["codes"], spec.bits, shape[1]), _unpack_grid(parts, spec, shape), sparse, low_rank)


def quantize(weight: Float[Tensor, "o i"], grid: Grid | Codebook) -> QTensor:
    """Round a weight to its nearest codes; exact for a weight that lies on the grid."""
    return QTensor(grid.codes(weight), grid)


def _pack_grid(grid: Grid | Codebook) -> dict[str, Tensor]:
    spec = grid.spec
    if isinstance(grid, Codebook):
        name, part = ("levels", grid.levels) if spec.kind == "nuq" else ("scale", grid.scale)
        return {name: part.to(scale_dtype(spec))}
    if spec.kind == "mxint":
        exponent = torch.frexp(grid.scale).exponent - 1 + spec.bits - 2
        return {"scale": (exponent + EXPONENT_BIAS).to(torch.uint8)}
    parts = {"scale": grid.scale.to(scale_dtype(spec))}
    if spec.stores_zero_point:
        parts["zero_point"] = _pack_zero_point(grid.zero_point, spec)
    return parts


def _unpack_grid(parts: dict[str, Tensor], spec: QuantSpec, shape: tuple[int, int]) -> Grid | Codebook:
    device, (rows, columns) = parts["codes"].device, shape
    row_of, column_of = row_index(spec, rows, device), column_index(spec, columns, device)
    if spec.dual:
        half = unpack(parts["column_set"][None], bits=1, count=columns)[0].long()
        column_of = half if column_of is None else column_of * 2 + half
    if spec.kind == "nuq":
        return Codebook.of_levels(spec, parts["levels"].float(), row_of, column_of)
    if spec.is_codebook:
        return Codebook.of_scale(spec, parts["scale"].float(), row_of, column_of)
    if spec.kind == "mxint":
        exponent = parts["scale"].int() - EXPONENT_BIAS - (spec.bits - 2)
        scale = torch.ldexp(torch.ones(exponent.shape, device=device), exponent)
    else:
        scale = parts["scale"].float()
    zero_point = torch.full_like(scale, implied_zero_point(spec))
    if spec.stores_zero_point:
        zero_point = _unpack_zero_point(parts["zero_point"], spec, scale.shape[1])
    return Grid(spec, scale, zero_point, row_of, column_of)


def _pack_zero_point(zero_point: Float[Tensor, "R C"], spec: QuantSpec) -> Tensor:
    if spec.zero_point == "real":
        return zero_point.to(scale_dtype(spec))
    if not packs_zero_point(spec):
        return zero_point.to(torch.int32)
    return pack(zero_point.clamp(0, highest_code(spec)).to(torch.uint8), spec.bits)


def _unpack_zero_point(stored: Tensor, spec: QuantSpec, columns: int) -> Float[Tensor, "R C"]:
    if spec.zero_point == "real" or not packs_zero_point(spec):
        return stored.float()
    return unpack(stored, spec.bits, columns).float()
