"""Kullback-Leibler divergence of two models' predictions, row by row."""

import torch
from jaxtyping import Float
from torch import Tensor


def kl_rows(reference: Float[Tensor, "n c"], logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """KL(softmax reference ‖ softmax logits) of each row, in nats, never negative."""
    log_p, log_q = reference.float().log_softmax(dim=1), logits.float().log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp_min(0)  # rounding can push a zero just below zero


def mean_and_error(values: Float[Tensor, " n"]) -> tuple[float, float]:
    """Mean and its standard error, in float64; no error (NaN) of a single value."""
    wide = values.double()
    error = wide.std() / len(wide) ** 0.5 if len(wide) > 1 else torch.tensor(float("nan"))
    return float(wide.mean()), float(error)
