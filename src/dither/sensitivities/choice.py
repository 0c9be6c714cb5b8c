"""A network that computes under a whole choice of options, for as long as a block of code lasts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dither.nn.activation import ActivationQuantizer
from dither.sensitivities.base import Probe
from dither.sensitivities.outputs import Codes
from dither.sensitivities.swap import Quantizers, quantizer_of, replaced


@contextmanager
def chosen(probe: Probe, stored: Codes, quantizers: Quantizers, choice: Sequence[int]) -> Iterator[None]:
    """While open, each unit computes as its option of a choice; a negative one leaves it as it is."""
    weights, inputs = dict[str, Tensor](), dict[str, ActivationQuantizer | None]()
    for unit, place in zip(probe.units, choice, strict=True):
        for name in unit.layers if place >= 0 else ():
            codes = stored(name, place)
            weights[name] = probe.weight(name) if codes is None else codes.dequantize()
            inputs[name] = quantizer_of(quantizers, name, probe.options[place].activations)
    with replaced(probe, weights, inputs):
        yield
