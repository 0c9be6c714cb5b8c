"""An independent reader of stored weights: bits to numbers with numpy, from config.json's words alone.

It shares no decoding with the writer, so that a file which both agree on holds what its description says.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dither.formats.codebook import FIXED_LEVELS
from dither.formats.mixed import SPANS
from dither.formats.spec import QuantSpec

Parts = Mapping[str, Tensor]


def decode(parts: Parts, entry: Mapping[str, Any]) -> Float[np.ndarray, "o i"]:
    """The float32 weight [o, i] of stored parts that a layer's entry in config.json describes."""
    spec, (rows, columns) = QuantSpec(**entry["weights"]), entry["shape"]
    codes = _codes_of_columns(parts) if spec.kind == "mix" else _stream(parts["codes"], spec.bits, columns)
    if spec.kind == "nuq":
        levels = parts["levels"].float().numpy()
        row, column = _cells(parts, spec, (rows, columns), levels.shape)
        dense = levels[row[:, None], column, codes]
    elif spec.kind == "mix":
        dense = _mixed(parts, spec, codes)
    else:
        scale = _statistic(parts, "scale", spec)
        where = np.ix_(*_cells(parts, spec, (rows, columns), scale.shape))
        if spec.kind in FIXED_LEVELS:
            dense = scale[where] * np.array(FIXED_LEVELS[spec.kind], dtype=np.float32)[codes]
        else:
            dense = scale[where] * (codes.astype(np.float32) - _zero_point(parts, spec, scale)[where])
    if "outliers" in parts:
        dense = dense + _sparse(parts, (rows, columns))
    if "low_rank_a" in parts:
        dense = dense + _factor(parts, "b", 0) @ _factor(parts, "a", 1)
    result: Float[np.ndarray, "o i"] = dense
    return result


def _codes_of_columns(parts: Parts) -> Int[np.ndarray, "r n"]:
    """Columns of one width lie together, the narrowest first; each width begins on a byte of its own."""
    packed, width = parts["codes"], np.array([int(top).bit_length() for top in parts["column_top"].tolist()])
    codes, start = np.zeros((len(packed), len(width)), dtype=np.int64), 0
    for bits in range(1, 9):
        columns = np.flatnonzero(width == bits)
        stop = start + (len(columns) * bits + 7) // 8
        codes[:, columns] = _stream(packed[:, start:stop].contiguous(), bits, len(columns))
        start = stop
    return codes


def _mixed(parts: Parts, spec: QuantSpec, codes: Int[np.ndarray, "r n"]) -> Float[np.ndarray, "r n"]:
    """Steps of a column are those of its cell's nominal width, times a ratio that a table of spans gives."""
    top, whole = parts["column_top"].numpy().astype(np.float64), 2**spec.bits - 1
    span = np.interp(np.log2(top + 1), np.arange(len(SPANS)), SPANS)
    ratio = np.where(top > 0, whole / np.maximum(top, 1) * span / SPANS[spec.bits], 0).astype(np.float32)
    stored = _statistic(parts, "scale", spec)
    where = np.ix_(*_cells(parts, spec, (codes.shape[0], codes.shape[1]), stored.shape))
    zero = np.where(top == 1, 0.5, np.floor((top + 1) / 2)).astype(np.float32)[None]
    if spec.symmetry == "asym":
        inverse = np.where(ratio > 0, np.float32(1) / np.where(ratio > 0, ratio, np.float32(1)), np.float32(0))
        middle = np.float32(whole / 2) - _statistic(parts, "zero_point", spec)[where]
        zero = (top / 2).astype(np.float32) - middle * inverse
    dense: Float[np.ndarray, "r n"] = (stored[where] * ratio) * (codes.astype(np.float32) - zero)
    return dense


def _cells(
    parts: Parts, spec: QuantSpec, shape: tuple[int, int], cells: tuple[int, ...]
) -> tuple[Int[np.ndarray, " o"], Int[np.ndarray, " i"]]:
    """For each row and each column which row and column of scales (or of levels) it uses."""
    (rows, columns), classes = shape, 2 if spec.dual else 1
    column = np.arange(columns) * (cells[1] // classes) // columns
    if "group_index" in parts:
        stored = parts["group_index"].numpy()
        column = stored.view(np.uint16 if stored.itemsize == 2 else np.uint8).astype(np.int64)
    if spec.dual:
        column = column * 2 + _stream(parts["column_set"][None], 1, columns)[0]
    return np.arange(rows) * cells[0] // rows, column


def _statistic(parts: Parts, name: str, spec: QuantSpec) -> Float[np.ndarray, "r c"]:
    if spec.kind == "mxint":
        exponent = parts[name].numpy().astype(np.int32) - 127 - (spec.bits - 2)
        powers: Float[np.ndarray, "r c"] = np.ldexp(np.float32(1), exponent)
        return powers
    if spec.scale_bits is None or f"{name}_step" not in parts:
        plain: Float[np.ndarray, "r c"] = parts[name].float().numpy()
        return plain
    step, offset = (parts[f"{name}_{key}"].float().numpy() for key in ("step", "offset"))
    codes = _stream(parts[name], spec.scale_bits, step.shape[1]).astype(np.float32)
    group = np.arange(len(codes)) // (spec.scale_group or len(codes))
    values: Float[np.ndarray, "r c"] = offset[group] + step[group] * codes
    return values


def _zero_point(parts: Parts, spec: QuantSpec, scale: Float[np.ndarray, "r c"]) -> Float[np.ndarray, "r c"]:
    if spec.symmetry == "unsigned":
        return np.zeros_like(scale)
    if spec.symmetry == "sym":
        return np.full_like(scale, 2 ** (spec.bits - 1) if spec.bits > 1 else 0.5)
    if spec.zero_point == "real":
        return _statistic(parts, "zero_point", spec)
    if parts["zero_point"].dtype == torch.uint8:
        return _stream(parts["zero_point"], spec.bits, scale.shape[1]).astype(np.float32)
    whole: Float[np.ndarray, "r c"] = parts["zero_point"].float().numpy()
    return whole


def _sparse(parts: Parts, shape: tuple[int, int]) -> Float[np.ndarray, "o i"]:
    columns, offsets = parts["outlier_columns"].numpy(), parts["outlier_rows"].numpy()
    columns = columns.view(np.uint16) if columns.itemsize == 2 else columns
    dense = np.zeros(shape, dtype=np.float32)
    for row, (start, stop) in enumerate(pairwise(offsets)):
        dense[row, columns[start:stop]] = parts["outliers"][start:stop].float().numpy()
    return dense


def _factor(parts: Parts, name: str, axis: int) -> Float[np.ndarray, "n m"]:
    factor: Float[np.ndarray, "n m"] = parts[f"low_rank_{name}"].float().numpy()
    if f"low_rank_{name}_scale" in parts:
        factor = factor * np.expand_dims(parts[f"low_rank_{name}_scale"].float().numpy(), axis)
    return factor


def _stream(packed: Tensor, bits: int, count: int) -> Int[np.ndarray, "r n"]:
    stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : count * bits]
    weights = (1 << np.arange(bits)).astype(np.int64)
    values: Int[np.ndarray, "r n"] = stream.reshape(len(packed), count, bits).astype(np.int64) @ weights
    return values
