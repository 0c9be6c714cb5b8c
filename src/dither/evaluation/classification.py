"""Run a classifier over pictures and sum up how right and how faithful it is."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.errors import InputError
from dither.evaluation.fidelity import agreement, kl_divergence, sqnr_db, top1

Progress = Callable[[int], None]  # called with the number of pictures done so far


@dataclass(frozen=True)
class Evaluation:
    """What a report says of a network; None where it does not apply, or labels or a reference were not given.

    `count` is of pictures or of windows of text. `top1` and `agreement` are shares in 0..1, `kl` is in nats, `sqnr_db`
    is inf if all logits are the reference's.
    """

    count: int
    source: str | None = None
    top1: float | None = None
    fp_top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None
    perplexity: float | None = None
    fp_perplexity: float | None = None

    def to_json(self) -> dict[str, int | float | str | None]:
        """Plain data for a report; what is infinite becomes None, which JSON can hold."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def predict(
    model: nn.Module,
    batches: Iterable[Float[Tensor, "_ c h w"]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Float[Tensor, "n classes"]:
    """The logits of all pictures, float32 on the CPU; `model` must be on `device` and comes back in its own modes."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    rows: list[Tensor] = []
    done = 0
    with torch.no_grad(), evaluating(model):
        for pixels in batches:
            logits = _logits(model(pixels.to(device=device, dtype=dtype)))
            rows.append(logits.to(device="cpu", dtype=torch.float32))
            done += len(pixels)
            if progress is not None:
                progress(done)
    if not rows:
        raise InputError("expected at least one batch of pictures to evaluate on, got none")
    return torch.cat(rows)


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Float[Tensor, "_ c h w"]],
    *,
    reference: Float[Tensor, "n classes"] | None = None,
    class_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    source: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy where `class_ids` are given, fidelity where the `reference` logits (of the full-precision model) are."""
    logits = predict(model, batches, device, progress)
    return Evaluation(
        count=len(logits),
        source=source,
        top1=None if class_ids is None else top1(logits, class_ids),
        fp_top1=None if class_ids is None or reference is None else top1(reference, class_ids),
        agreement=None if reference is None else agreement(reference, logits),
        kl=None if reference is None else kl_divergence(reference, logits),
        sqnr_db=None if reference is None else sqnr_db(reference, logits),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and give each its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _logits(output: object) -> Float[Tensor, "b classes"]:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise InputError(f"expected a classifier that returns logits of shape (pictures, classes), got {got}")
    return logits
