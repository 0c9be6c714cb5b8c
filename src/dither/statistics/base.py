"""The contract of every statistic, and the check that its input is finite."""

from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import NonFiniteError

S = TypeVar("S")


@runtime_checkable
class Statistic(Protocol):
    """An accumulator; `merge` is associative, so one pass, several processes and several machines agree."""

    def merge(self: S, other: S) -> S:
        """A new statistic over both inputs."""
        ...


def as_rows(x: Float[Tensor, "*b d"]) -> Float[Tensor, "n d"]:
    """Rows of the last axis, in float32 or wider.

    Raises:
        NonFiniteError: NaN or Inf among them.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if rows.numel() and not all(bool(torch.isfinite(x)) for x in torch.aminmax(rows)):  # both are NaN where any is
        count = int((~torch.isfinite(rows)).sum())
        raise NonFiniteError(f"activations hold {count} NaN or Inf among {rows.numel()} values")
    return rows
