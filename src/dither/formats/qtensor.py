"""QTensor: a weight as it is stored, codes on a grid, with its bytes counted honestly."""

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dither.errors import ShapeError
from dither.formats.grid import Grid, column_index, grid_shape, highest_code, implied_zero_point, row_index
from dither.formats.packing import pack, packed_width, unpack
from dither.formats.ranges import scale_dtype
from dither.formats.spec import QuantSpec


@dataclass(frozen=True)
class QTensor:
    """Codes [o, i] of at most 8 bits and the grid that gives them their values."""

    codes: UInt8[Tensor, "o i"]
    grid: Grid

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        return self.grid.spec

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The values that the codes stand for; computed in float32."""
        return self.grid.decode(self.codes.float()).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes, scales, zero-points and the column set of a dual grid."""
        return sum(prod(size) * dtype.itemsize for size, dtype in layout(self.spec, self.shape).values())

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, everything included."""
        return 8 * self.nbytes / self.codes.numel()

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors by their short names; `layout` says their shapes."""
        spec, parts = self.spec, {"codes": pack(self.codes, self.spec.bits)}
        parts["scale"] = self.grid.scale.to(scale_dtype(spec))
        if spec.stores_zero_point:
            parts["zero_point"] = _pack_zero_point(self.grid.zero_point, spec)
        if spec.dual and self.grid.column_of is not None:
            parts["column_set"] = pack(self.grid.column_of.to(torch.uint8)[None], bits=1)[0]
        return parts

    @classmethod
    def unpack(cls, parts: dict[str, Tensor], spec: QuantSpec, shape: tuple[int, int]) -> "QTensor":
        """The inverse of `pack`.

        Raises:
            ShapeError: a stored tensor is missing or has another shape than spec and shape say.
        """
        for name, (size, dtype) in layout(spec, shape).items():
            if name not in parts or parts[name].shape != size or parts[name].dtype != dtype:
                found = f"{tuple(parts[name].shape)} {parts[name].dtype}" if name in parts else "nothing"
                raise ShapeError(f"stored {name} of {spec} for weight {shape}: expected {size} {dtype}, got {found}")
        device, (rows, columns) = parts["codes"].device, shape
        scale = parts["scale"].float()
        zero_point = torch.full_like(scale, implied_zero_point(spec))
        if spec.stores_zero_point:
            zero_point = _unpack_zero_point(parts["zero_point"], spec, scale.shape[1])
        column_of = column_index(spec, columns, device)
        if spec.dual:
            column_of = unpack(parts["column_set"][None], bits=1, count=columns)[0].long()
        grid = Grid(spec, scale, zero_point, row_index(spec, rows, device), column_of)
        return cls(unpack(parts["codes"], spec.bits, columns), grid)


def layout(spec: QuantSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of a weight [o, i], so that a file can be read without its maker."""
    (rows, columns), cells = shape, grid_shape(spec, *shape)
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((rows, packed_width(columns, spec.bits)), torch.uint8),
        "scale": (cells, scale_dtype(spec)),
    }
    if spec.stores_zero_point:
        if spec.zero_point == "real":
            parts["zero_point"] = (cells, scale_dtype(spec))
        elif _packable(spec):
            parts["zero_point"] = ((cells[0], packed_width(cells[1], spec.bits)), torch.uint8)
        else:
            parts["zero_point"] = (cells, torch.int32)
    if spec.dual:
        parts["column_set"] = ((packed_width(columns, 1),), torch.uint8)
    return parts


def quantize(weight: Float[Tensor, "o i"], grid: Grid) -> QTensor:
    """Round a weight to its nearest codes; exact for a weight that lies on the grid."""
    return QTensor(grid.codes(weight), grid)


def _packable(spec: QuantSpec) -> bool:
    return spec.zero_point == "clamped" or (spec.zero_point == "integer" and spec.include_zero)


def _pack_zero_point(zero_point: Float[Tensor, "R C"], spec: QuantSpec) -> Tensor:
    if spec.zero_point == "real":
        return zero_point.to(scale_dtype(spec))
    if not _packable(spec):
        return zero_point.to(torch.int32)
    return pack(zero_point.clamp(0, highest_code(spec)).to(torch.uint8), spec.bits)


def _unpack_zero_point(stored: Tensor, spec: QuantSpec, columns: int) -> Float[Tensor, "R C"]:
    if spec.zero_point == "real" or not _packable(spec):
        return stored.float()
    return unpack(stored, spec.bits, columns).float()
