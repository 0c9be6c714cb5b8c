"""Gradients of layers' weights, sample by sample, each measured when it arrives and freed at once.

Passes run over the whole model as it stands: in full precision before the walk, or behind the quantized prefix during
it. Only the layers that are asked for get gradients, each for its own use of a weight that others may share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.errors import InputError, NonFiniteError
from dither.models.layers import Layer, as_matrix, given_input, input_rows, is_layer, weight_matrix
from dither.models.losses import Loss, natural_loss
from dither.nn.linear import cache_weights
from dither.statistics.base import as_rows

NOT_RESIDENT = (
    "gradients need all weights in memory, but the model is read block by block; "
    "use a machine with more memory, or a method without gradients, such as gptq or spqr"
)
HALF_SCALE = 1024.0  # of the loss of float16 models, whose gradients of 1e-6 and less would be lost

T = TypeVar("T")


@runtime_checkable
class Mergeable(Protocol):
    """What is accumulated over samples."""

    def merge(self: T, other: T) -> T:
        """A new statistic over both."""
        ...


S = TypeVar("S", bound=Mergeable)
Progress = Callable[[str, int, int], None]  # (what, samples done, in all)


class Gradients:
    """Backward passes of a model over calibration data, one sample a pass."""

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Any], Any],
        batches: Sequence[Any],
        loss: Loss | None = None,
        resident: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """`run` calls the model on a batch; `resident` says that all its weights are in memory."""
        self.model, self.run, self.batches, self.progress = model, run, batches, progress
        self.loss = natural_loss(model) if loss is None else loss
        self.resident = resident

    def weight(self, name: str) -> Float[Tensor, "o i"]:
        """A layer's weight as a matrix."""
        return weight_matrix(self.layer(name), name)

    def of_sample(
        self, index: int, layers: Sequence[str], measure: Callable[[str, Float[Tensor, "o i"]], T]
    ) -> dict[str, T]:
        """measure(layer, gradient [o, i] in float32) of one sample; a layer that it does not reach has zeros.

        Raises:
            InputError: there are fewer samples, or the weights are not all in memory.
            NonFiniteError: NaN or Inf in an input, the loss or a gradient; the message names the layer.
        """
        sample = next(islice(self.samples(), index, None), None)
        if sample is None:
            raise InputError(f"sample {index} was asked for, the calibration data have {self.count}")
        found: dict[str, T] = {}

        def keep(name: str, gradient: Tensor) -> None:
            found[name] = measure(name, gradient)

        with _decoded(self.model):
            self._backward(sample, layers, keep)
        return {name: found[name] for name in layers}

    def accumulate(
        self, measures: Mapping[str, Callable[[Float[Tensor, "o i"]], S]], samples: int | None = None
    ) -> dict[str, S]:
        """A statistic of each named layer's gradient over the first `samples` samples, all by default.

        Raises:
            InputError: the weights are not all in memory.
            NonFiniteError: NaN or Inf in an input, the loss or a gradient; the message names the layer.
        """
        found: dict[str, S] = {}

        def add(name: str, gradient: Tensor) -> None:
            part = measures[name](gradient)
            found[name] = found[name].merge(part) if name in found else part

        wanted = self.count if samples is None else min(samples, self.count)
        with _decoded(self.model):
            for done, sample in enumerate(islice(self.samples(), wanted), start=1):
                self._backward(sample, list(measures), add)
                if self.progress is not None:
                    self.progress("gradients", done, wanted)
        return {name: found[name] for name in measures}

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(rows_of(batch) for batch in self.batches)

    def samples(self) -> Iterator[Any]:
        """Every sample as a batch of one."""
        for batch in self.batches:
            yield from (row_of(batch, index, rows_of(batch)) for index in range(rows_of(batch)))

    def layer(self, name: str) -> Layer:
        """A layer in full precision by its name."""
        layer = self.model.get_submodule(name)
        if not is_layer(layer):
            raise TypeError(f"{name} is a {type(layer).__name__}, not a layer in full precision")
        return layer

    def _matrix(self, name: str, gradient: Tensor | None) -> Float[Tensor, "o i"]:
        if gradient is None:
            raise TypeError(f"no gradient of {name}")
        matrix = as_matrix(self.layer(name), gradient)
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(f"the gradient of {name}.weight holds NaN or Inf; try the model in float32")
        return matrix

    def _backward(self, sample: Any, layers: Sequence[str], arrive: Callable[[str, Tensor], None]) -> None:
        """One pass; `arrive` gets each layer's gradient as soon as it is there."""
        if not self.resident:
            raise InputError(NOT_RESIDENT)
        missing = set(layers)

        def hook(name: str, scale: float) -> Callable[[Tensor], None]:
            def take(leaf: Tensor) -> None:
                gradient, leaf.grad = leaf.grad, None
                missing.discard(name)
                arrive(name, self._matrix(name, gradient) / scale)

            return take

        with torch.enable_grad(), leaves_of({name: self.layer(name) for name in layers}, self.model) as leaves:
            scale = HALF_SCALE if any(leaf.dtype == torch.float16 for leaf in leaves.values()) else 1.0
            for name, leaf in leaves.items():
                leaf.register_post_accumulate_grad_hook(hook(name, scale))
            loss = self.loss(sample, self.run(sample))
            if not bool(torch.isfinite(loss)):
                self.blame(sample, layers)
            if not loss.requires_grad:
                raise InputError(f"the loss of {type(self.model).__name__} does not depend on {layers[0]}")
            (loss * scale).backward()
        for name in [name for name in layers if name in missing]:
            arrive(name, torch.zeros_like(self.weight(name)))

    def blame(self, sample: Any, layers: Sequence[str]) -> None:
        """Name the first layer whose input is not finite."""

        def check(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                try:
                    as_rows(input_rows(self.layer(name), given_input(args, kwargs)))
                except NonFiniteError as error:
                    raise NonFiniteError(f"input of {name}: {error}") from None

            return hook

        handles = [self.layer(name).register_forward_pre_hook(check(name), with_kwargs=True) for name in layers]
        try:
            self.run(sample)
        finally:
            for handle in handles:
                handle.remove()
        raise NonFiniteError(f"the loss of {type(self.model).__name__} on the calibration data is NaN or Inf")


@contextmanager
def leaves_of(layers: Mapping[str, Layer], model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """While open, these layers' weights alone ask for gradients: stand-ins on the same memory, no longer tied."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        for name, layer in layers.items():
            layer.weight = nn.Parameter(own[name].detach())
        yield {name: layer.get_parameter("weight") for name, layer in layers.items()}
    finally:
        for name, layer in layers.items():
            layer.weight = own[name]
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _decoded(model: nn.Module) -> Iterator[None]:
    """While open, weights that are stored as codes are decoded once, not once a sample."""
    cache_weights(model)
    try:
        yield
    finally:
        cache_weights(model, False)


def rows_of(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((rows_of(part) for part in parts if rows_of(part)), 0)


def row_of(batch: Any, index: int, rows: int) -> Any:
    """One sample as a batch; what has no row for each sample is shared."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.ndim and len(batch) == rows else batch
    if isinstance(batch, Mapping):
        return {key: row_of(part, index, rows) for key, part in batch.items()}
    return type(batch)(row_of(part, index, rows) for part in batch) if isinstance(batch, list | tuple) else batch
