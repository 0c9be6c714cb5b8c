"""Dense bit packing: codes of 1 to 8 bits become one least-significant-bit-first stream a row.

The layout is that of compressed-tensors from 0.18 on and of GPTQ (there along the other axis): value k of a row
occupies bits k*B … k*B+B-1 of the row's stream, bit j of the stream is bit j % 8 of byte j // 8.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from dither.errors import ShapeError

_OCTET = 8  # codes of B bits fill B bytes, so eight at a time start and end on a byte, whatever B is


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return -(-count * bits // 8)


def pack(codes: UInt8[Tensor, "r n"], bits: int) -> UInt8[Tensor, "r bytes"]:
    """Pack each row of codes; the last byte is filled with zero bits.

    Raises:
        ShapeError: `bits` is not 1 to 8, or a code does not fit into it.
    """
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ShapeError(f"packing to {bits} bits: codes must be below {2**bits}, got {int(codes.max())}")
    count = codes.shape[1]
    octets = functional.pad(codes, (0, -count % _OCTET)).unflatten(1, (-(-count // _OCTET), _OCTET))
    words = torch.zeros(octets.shape[:2], dtype=torch.long, device=codes.device)
    for place in range(_OCTET):
        words |= octets[:, :, place].long() << place * bits
    stream = torch.stack([(words >> 8 * byte & 255).to(torch.uint8) for byte in range(bits)], dim=2)
    return stream.flatten(1)[:, : packed_width(count, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "r bytes"], bits: int, count: int) -> UInt8[Tensor, "r n"]:
    """The first `count` codes of each row; the inverse of `pack`.

    Raises:
        ShapeError: `bits` is not 1 to 8, or the row is not as long as `count` codes need.
    """
    _check_bits(bits)
    width = packed.shape[1]
    if width != packed_width(count, bits):
        raise ShapeError(
            f"unpacking {count} codes of {bits} bits: expected {packed_width(count, bits)} bytes, got {width}"
        )
    stream = functional.pad(packed, (0, -width % bits)).unflatten(1, (-(-width // bits), bits))
    words = torch.zeros(stream.shape[:2], dtype=torch.long, device=packed.device)
    for byte in range(bits):
        words |= stream[:, :, byte].long() << 8 * byte
    mask = 2**bits - 1
    octets = torch.stack([(words >> place * bits & mask).to(torch.uint8) for place in range(_OCTET)], dim=2)
    return octets.flatten(1)[:, :count].contiguous()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ShapeError(f"packing: codes have 1 to 8 bits, got {bits}")
