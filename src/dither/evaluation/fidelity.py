"""How close a network's outputs are to a reference network's, and how often they are right; all sums in float64."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import InputError, NonFiniteError, ShapeError

CHUNK_ROWS = 1024  # rows converted to float64 at a time, so that large vocabularies fit in memory


def sqnr_db(reference: Float[Tensor, "..."], approximate: Float[Tensor, "..."]) -> float:
    """Signal-to-quantization-noise ratio in dB: 10 log10(sum of reference² / sum of squared error); inf if equal."""
    _check_pair(reference, approximate)
    signal = noise = 0.0
    for wanted, got in _chunks(reference, approximate):
        signal += wanted.square().sum().item()
        noise += (got - wanted).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def kl_divergence(reference_logits: Float[Tensor, "..."], logits: Float[Tensor, "..."]) -> float:
    """KL(reference ‖ approximation) between the rows' softmax distributions, in nats, mean over rows."""
    _check_pair(reference_logits, logits, rows=True)
    total = 0.0
    for wanted, got in _chunks(reference_logits, logits):
        log_p, log_q = wanted.log_softmax(dim=1), got.log_softmax(dim=1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return max(total / len(logits), 0.0)  # rounding can push a zero just below zero


def agreement(reference_logits: Float[Tensor, "..."], logits: Float[Tensor, "..."]) -> float:
    """The share of rows in which both prefer the same class."""
    _check_pair(reference_logits, logits, rows=True)
    return (reference_logits.argmax(dim=1) == logits.argmax(dim=1)).double().mean().item()


def top1(logits: Float[Tensor, "n c"], class_ids: Sequence[int]) -> float:
    """The share of rows whose preferred class is the labelled one."""
    _check_finite(logits, "logits")
    rows, classes = logits.shape
    if len(class_ids) != rows:
        raise InputError(f"expected one class id per row of logits, got {len(class_ids)} ids for {rows} rows")
    if not rows:
        raise InputError("expected at least one row of logits, got none")
    if not 0 <= min(class_ids) <= max(class_ids) < classes:
        raise InputError(
            f"expected class ids in 0..{classes - 1}, the model's classes, got {min(class_ids)}..{max(class_ids)}; "
            "the labels belong to another data set or are counted otherwise"
        )
    wanted = torch.tensor(class_ids, device=logits.device)
    return (logits.argmax(dim=1) == wanted).double().mean().item()


def _chunks(
    reference: Float[Tensor, "..."], approximate: Float[Tensor, "..."]
) -> Iterator[tuple[Float[Tensor, "..."], Float[Tensor, "..."]]]:
    """Both tensors in slices of their first axis, in float64."""
    for wanted, got in zip(
        torch.atleast_1d(reference).split(CHUNK_ROWS), torch.atleast_1d(approximate).split(CHUNK_ROWS), strict=True
    ):
        yield wanted.double(), got.double()


def _check_pair(reference: Float[Tensor, "..."], approximate: Float[Tensor, "..."], *, rows: bool = False) -> None:
    if reference.shape != approximate.shape:
        raise ShapeError(
            f"expected the reference's shape {tuple(reference.shape)} in both, got {tuple(approximate.shape)}"
        )
    if rows and reference.ndim != 2:
        raise ShapeError(f"expected logits of shape (rows, classes), got {tuple(reference.shape)}")
    if not reference.numel():
        raise InputError(f"expected at least one value to compare, got shape {tuple(reference.shape)}")
    _check_finite(reference, "the reference")
    _check_finite(approximate, "the approximation")


def _check_finite(values: Float[Tensor, "..."], name: str) -> None:
    bad = int((~values.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"expected finite outputs, got {bad} NaN or Inf of {values.numel()} values in {name}")
