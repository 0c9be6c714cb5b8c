"""The loss whose gradients say how much a weight matters, where nobody gives labels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from dither.errors import InputError

Loss = Callable[[Any, Any], Tensor]  # (batch, what the model returned for it) → one number
_IGNORED = -100


def natural_loss(model: nn.Module) -> Loss:
    """What a causal language model was trained for; for any other model, how sure it is of what it says."""
    can_generate = getattr(model, "can_generate", None)
    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return next_token_loss if callable(can_generate) and can_generate() and decoder else own_prediction_loss


def next_token_loss(batch: Any, output: Any) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token given those before it, in nats; masked (padding) tokens do not count.

    Raises:
        InputError: the batch holds no `input_ids`, or only one token to a sequence.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise InputError("the loss of a language model needs batches of input_ids")
    following: Int[Tensor, "b s"] = batch["input_ids"][:, 1:]
    if not following.shape[1]:
        raise InputError("the loss of a language model needs sequences of at least 2 tokens, one to predict")
    if batch.get("attention_mask") is not None:
        following = following.masked_fill(batch["attention_mask"][:, 1:] == 0, _IGNORED)
    return functional.cross_entropy(logits_of(output)[:, :-1].flatten(0, 1).float(), following.flatten())


def own_prediction_loss(batch: Any, output: Any) -> Float[Tensor, ""]:
    """Mean cross-entropy to the classes that the model itself prefers, as labels are not known.

    Raises:
        InputError: the model returns no logits.
    """
    rows = class_rows(output)
    return functional.cross_entropy(rows, rows.detach().argmax(dim=-1))


def drawn_prediction_loss(generator: torch.Generator) -> Loss:
    """Mean cross-entropy to classes drawn from what the model itself predicts.

    The mean square of such gradients is the diagonal of the Hessian of the divergence from the model's own prediction
    (Fisher's identity), while the gradient of that divergence is zero there. Raises as `own_prediction_loss`.
    """

    def loss(batch: Any, output: Any) -> Float[Tensor, ""]:
        rows = class_rows(output)
        if not bool(rows.isfinite().all()):  # nothing can be drawn: whoever asked finds the layer to blame
            return rows.sum() * torch.nan
        chances = rows.detach().softmax(dim=-1).cpu()
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return functional.cross_entropy(rows, labels.to(rows.device))

    return loss


def self_divergence_loss(batch: Any, output: Any) -> Float[Tensor, ""]:
    """Divergence of the prediction from itself, whose gradient is zero but for rounding; raises as the others."""
    rows = class_rows(output)
    return functional.kl_div(rows.log_softmax(-1), rows.detach().softmax(-1), reduction="batchmean")


def class_rows(output: Any) -> Float[Tensor, "n c"]:
    """Logits as rows in float32; classes lie along the last axis, for maps [b, c, h, w] along the second.

    Raises:
        InputError: the model returns no logits.
    """
    logits = logits_of(output).float()
    return (logits.movedim(1, -1) if logits.ndim == 4 else logits).flatten(0, -2)


def logits_of(output: Any) -> Tensor:
    """The logits among what a model returned.

    Raises:
        InputError: there are none.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    logits = getattr(first, "logits", first)
    if not isinstance(logits, Tensor) or not torch.is_floating_point(logits) or logits.ndim < 2:
        raise InputError(f"expected a model that returns logits, got {type(logits).__name__}")
    return logits
