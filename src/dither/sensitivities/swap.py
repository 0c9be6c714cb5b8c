"""Layers that compute as if they were stored as an option, for as long as a block of code lasts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.folding import replaced_weight
from dither.formats.activation import fit_activation
from dither.formats.spec import QuantSpec
from dither.models.gradients import rows_of
from dither.models.layers import Layer, given_input
from dither.nn.activation import ActivationQuantizer
from dither.sensitivities.base import Probe
from dither.statistics.sample import RowSample

Quantizers = Mapping[tuple[str, QuantSpec], ActivationQuantizer]


@contextmanager
def input_quantized(layer: Layer, quantizer: ActivationQuantizer | None) -> Iterator[None]:
    """While open, the layer sees its input on the quantizer's grid."""
    if quantizer is None:
        yield
        return

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        x = quantizer(given_input(args, kwargs))
        return ((x, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): x})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(
    probe: Probe, weights: Mapping[str, Float[Tensor, "o i"]], quantizers: Mapping[str, ActivationQuantizer | None]
) -> Iterator[None]:
    """While open, these layers have other weights, and their inputs are quantized."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            stack.enter_context(replaced_weight(probe.layer(name), weight))
            stack.enter_context(input_quantized(probe.layer(name), quantizers.get(name)))
        yield


def fit_inputs(probe: Probe) -> dict[tuple[str, QuantSpec], ActivationQuantizer]:
    """A quantizer for each layer's input and each input format among the options, fitted on the calibration data."""
    specs = list(dict.fromkeys(option.activations for option in probe.options if option.activations is not None))
    if not specs:
        return {}
    samples: dict[str, RowSample] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found = RowSample.of(given_input(args, kwargs))
            samples[name] = samples[name].merge(found) if name in samples else found

        return hook

    still = [name for name in probe.layers if any(not spec.dynamic for spec in specs)]
    handles = [probe.layer(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in still]
    try:
        with torch.no_grad():
            for batch in probe.batches if still else ():
                probe.network.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    fitted = {}
    for name in probe.layers:
        for spec in specs:
            quantizer = ActivationQuantizer(spec).to(probe.network.device)
            if not spec.dynamic and name in samples:
                quantizer.set(fit_activation(samples[name].rows, spec))
            fitted[name, spec] = quantizer
    return fitted


def quantizer_of(quantizers: Quantizers, name: str, spec: QuantSpec | None) -> ActivationQuantizer | None:
    """The quantizer of a layer's input in a format; None where it stays in full precision."""
    return None if spec is None else quantizers[name, spec]


@torch.no_grad()
def input_errors(probe: Probe, quantizers: Quantizers) -> dict[tuple[str, QuantSpec], float]:
    """‖Q(a) - a‖² of each layer's input and input format, as a mean over samples."""
    total = dict.fromkeys(quantizers, 0.0)
    samples = sum(rows_of(batch) for batch in probe.batches)

    def add(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = given_input(args, kwargs)
            for (layer, spec), quantizer in quantizers.items():
                if layer == name:
                    total[layer, spec] += float((quantizer(x) - x).double().square().sum()) / samples

        return hook

    handles = [probe.layer(name).register_forward_pre_hook(add(name), with_kwargs=True) for name in probe.layers]
    try:
        for batch in probe.batches:
            probe.network.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return total
