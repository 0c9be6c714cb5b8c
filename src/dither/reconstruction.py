"""A block as something to learn: its output as a function of a few of its tensors, against the original's output.

What is learned and how is said by the parts in `solvers/`; here the block is called with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from dither.errors import InputError
from dither.models.forward import Stream
from dither.nn.activation import ActivationQuantizer
from dither.walk import Block, Inputs

Weighing = Literal["plain", "token"]


class BlockLoss:
    """Mean squared error of a block's output, by the tensors that stand for some of its parameters.

    Weights are given as matrices by full layer names, other parameters by their full names. Layers that have a
    quantizer see quantized inputs, through which gradients pass. `weigh="token"` divides each token's error by the mean
    square of the original's, so that tokens of huge activations count as others do.
    """

    def __init__(
        self, block: Block, inputs: Inputs, quantizers: Mapping[str, ActivationQuantizer], weigh: Weighing = "plain"
    ) -> None:
        """Checks that the block's outputs go with its inputs sample by sample.

        Raises:
            InputError: they do not, the walk was started for other inputs, or other ranks have some of the samples.
        """
        block.check(inputs)
        if block.team.size > 1:
            raise InputError("it draws samples from all batches, which ranks share; run it in one process")
        self.block, self.inputs, self.quantizers, self.weigh = block, inputs, quantizers, weigh
        self.stream = block.streams["fp" if inputs == "fp" else "quantized"]
        samples = sorted({0, self.samples - 1})
        originals = next(iter(block.streams.values()))
        alone = first_tensor(originals.call(block.reference, samples))
        whole = self._whole(originals, samples)
        if whole.shape != alone.shape or not torch.allclose(whole, alone, rtol=1e-2, atol=1e-2 * float(whole.std())):
            name = block.unit.name
            raise InputError(f"{name} mixes the samples of a batch, so it cannot be reconstructed; skip its layers")

    @property
    def samples(self) -> int:
        """How many calibration samples all batches hold together."""
        return self.stream.samples

    def __call__(self, values: Mapping[str, Tensor], samples: Sequence[int]) -> Float[Tensor, ""]:
        """The loss over some samples."""
        with self._quantized_inputs():
            output = first_tensor(self.stream.call(self._with(values), samples))
        target = self._target(samples).float()
        error = (output.float() - target).square().mean(dim=-1)
        if self.weigh == "token":
            error = error / target.square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return error.mean()

    def _target(self, samples: Sequence[int]) -> Tensor:
        """The original block's output: on its own inputs, or on the quantized prefix's where only these were walked."""
        block = self.block
        if self.inputs == "quantized" or block.originals is None:
            with torch.no_grad():
                return first_tensor(self.stream.call(block.reference, samples))
        return first_tensor(block.streams["fp"].pick(block.originals, samples))

    def _whole(self, stream: Stream, samples: Sequence[int]) -> Tensor:
        """The same, of samples cut out of the outputs of whole batches."""
        outputs = stream.outputs(self.block.reference) if self.block.originals is None else self.block.originals
        return first_tensor(stream.pick(outputs, samples))

    def _with(self, values: Mapping[str, Tensor]) -> Callable[..., Any]:
        block, parameters = self.block, {}
        for name, value in values.items():
            if name in block.unit.layers:
                layer = block.layer(name)
                key = f"{block.local(name)}.weight".removeprefix(".")
                parameters[key] = _as_parameter(layer, value).to(layer.weight.dtype)
            else:
                parameters[block.local(name)] = value.to(block.module.get_parameter(block.local(name)).dtype)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block.module, parameters, args, kwargs)

        return call

    @contextmanager
    def _quantized_inputs(self) -> Iterator[None]:
        handles = []
        for name, quantizer in self.quantizers.items():
            local = self.block.local(name)
            layer = self.block.module.get_submodule(local) if local else self.block.module
            handles.append(layer.register_forward_pre_hook(_seen_through(quantizer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _as_parameter(layer: nn.Module, matrix: Float[Tensor, "o i"]) -> Tensor:
    """The matrix in the shape of the layer's weight; only transformers' Conv1D holds it transposed."""
    weight = layer.get_parameter("weight")
    return matrix.reshape(weight.shape) if isinstance(layer, nn.Linear | nn.Conv2d) else matrix.T


def _seen_through(quantizer: ActivationQuantizer) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, args: (quantizer.approximate(args[0]), *args[1:])


def first_tensor(output: Any) -> Tensor:
    """A block's output, where it returns more than that."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output
