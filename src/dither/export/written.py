"""What an exporter hands back: the files, and how to read each value from them again."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dither.export.integers import IntegerWeight

_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # of a value, to nearest

Logits = Float[np.ndarray, "b classes"]


@dataclass(frozen=True)
class Written:
    """An export before it is compared.

    `weight` decodes a layer's weight [o, i] from the file by other code than wrote it; `bound` says how far rounding to
    the file's type may take each value; `kept` reads any other tensor back, or says None where the form has none.
    `logits` gives what the runtime and what dither's own network say of a batch of pictures, where it can be run here.
    """

    files: list[str]
    dtype: torch.dtype
    weight: Callable[[str], Float[np.ndarray, "o i"]]
    kept: Callable[[str], Tensor | None]
    bound: Callable[[str], Float[np.ndarray, "o i"]]
    opens_with: str
    notes: list[str] = field(default_factory=list)
    logits: Callable[[Tensor], tuple[Logits, Logits]] | None = None


def scale_bound(weight: IntegerWeight, dtype: torch.dtype) -> Float[np.ndarray, "o i"]:
    """How far a value may move when scales are rounded to `dtype`: not at all where they fit."""
    rounding = torch.where(weight.scale.to(dtype).float() == weight.scale, 0.0, weight.scale.abs() * _ROUNDING[dtype])
    column = torch.arange(weight.codes.shape[1]) // (weight.group_size or weight.codes.shape[1])
    steps = (weight.codes.int() - weight.zero_point[:, column]).abs()
    return np.asarray((steps * rounding[:, column]).double())


def value_bound(weight: Float[np.ndarray, "o i"], dtype: torch.dtype) -> Float[np.ndarray, "o i"]:
    """How far values move when they are rounded to `dtype` themselves."""
    return np.asarray(np.abs(weight).astype(np.float64) * _ROUNDING[dtype] + torch.finfo(dtype).tiny * _ROUNDING[dtype])
