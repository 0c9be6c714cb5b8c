"""Dense bit packing: codes of 1 to 8 bits become one least-significant-bit-first stream a row.

The layout is that of compressed-tensors from 0.18 on and of GPTQ (there along the other axis): value k of a row
occupies bits k*B … k*B+B-1 of the row's stream, bit j of the stream is bit j % 8 of byte j // 8.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from dither.errors import ShapeError


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return -(-count * bits // 8)


def pack(codes: UInt8[Tensor, "r n"], bits: int) -> UInt8[Tensor, "r bytes"]:
    """Pack each row of codes; the last byte is filled with zero bits.

    Raises:
        ShapeError: a code does not fit into `bits`.
    """
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ShapeError(f"packing to {bits} bits: codes must be below {2**bits}, got {int(codes.max())}")
    rows, count = codes.shape
    stream = (codes[:, :, None] >> _places(bits, codes.device)) & 1
    padded = torch.zeros(rows, packed_width(count, bits) * 8, dtype=torch.uint8, device=codes.device)
    padded[:, : count * bits] = stream.reshape(rows, count * bits)
    octets = padded.reshape(rows, -1, 8) << _places(8, codes.device)
    return octets.sum(dim=-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "r bytes"], bits: int, count: int) -> UInt8[Tensor, "r n"]:
    """The first `count` codes of each row; the inverse of `pack`.

    Raises:
        ShapeError: the row is not as long as `count` codes need.
    """
    rows, width = packed.shape
    if width != packed_width(count, bits):
        raise ShapeError(
            f"unpacking {count} codes of {bits} bits: expected {packed_width(count, bits)} bytes, got {width}"
        )
    stream = (packed[:, :, None] >> _places(8, packed.device)) & 1
    used = stream.reshape(rows, width * 8)[:, : count * bits].reshape(rows, count, bits)
    return (used << _places(bits, packed.device)).sum(dim=-1, dtype=torch.uint8)


def _places(count: int, device: torch.device) -> UInt8[Tensor, " count"]:
    return torch.arange(count, dtype=torch.uint8, device=device)
