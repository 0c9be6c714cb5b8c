"""evaluate: top-1 where there are labels, perplexity of text, and fidelity to the full-precision model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.data import DataSet
from dither.errors import InputError
from dither.evaluation.classification import Evaluation
from dither.evaluation.exam import BATCH, PictureExam, open_exam
from dither.models.network import Network, open_network

Progress = Callable[[str, int, int], None]  # (whose answers, pictures or windows done, in all)


def evaluate(
    model: str | Path | nn.Module | Network,
    data: str | Path | DataSet,
    *,
    reference: str | Path | nn.Module | Network | Float[Tensor, "n classes"] | None = None,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    length: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a classifier over pictures, or a causal language model over text.

    `reference` is the full-precision model (or its logits on the same pictures). `count` evaluates on the pictures
    drawn with `seed`, or on the first `count` windows of `length` tokens, instead of all.

    Raises:
        PathError, InputError: the model or the data cannot be read or do not fit, or there are pictures with neither
            labels nor a reference.
    """
    network = _network(model, device)
    exam = open_exam(network, data, count, seed, batch_size, length)
    if isinstance(exam, PictureExam):
        if exam.class_ids is None and reference is None:
            raise InputError(f"{exam.source!r} has no labels: give a reference model to compare with, or labels")
        if isinstance(reference, Tensor):
            exam, reference = replace(exam, reference=reference), None
    if reference is not None and not isinstance(reference, Tensor):
        exam = exam.answered_by(_network(reference, device), _counting(progress, "reference", exam.count))
    return exam.mark(network, _counting(progress, "model", exam.count))


def _counting(progress: Progress | None, what: str, count: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    say = progress
    return lambda done: say(what, done, count)


def _network(model: str | Path | nn.Module | Network, device: str | torch.device | None) -> Network:
    if isinstance(model, Network):
        return model
    if isinstance(model, nn.Module):
        return open_network(model)
    return open_network(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
