"""Values in parts: what comes together again is what was taken apart, and what was one tensor is one."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dither.engine.apart import Form, as_bytes, put_together, take_apart
from dither.formats.spec import QuantSpec
from dither.nn.activation import ActivationQuantizer
from dither.statistics.gram import Gram


@dataclass(frozen=True)
class Nest:
    """A statistic of everything that statistics are made of."""

    tensors: list[Tensor]
    named: dict[str, tuple[Tensor | None, int]]
    gram: Gram | None


def through(value: object) -> object:
    """As it arrives elsewhere: every tensor from its bytes."""
    rest, tensors = take_apart(value)
    assert not any(isinstance(part, Tensor) for part in vars(rest).values())
    return put_together(rest, [Form.of(tensor).tensor(as_bytes(tensor).clone()) for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.int64])
def test_tensors_of_any_type_and_shape_arrive_as_they_were(dtype: torch.dtype) -> None:
    tensors = [torch.arange(12).reshape(3, 4).T.to(dtype), torch.ones((), dtype=dtype), torch.empty(0, 3, dtype=dtype)]
    nest = Nest(tensors, {"a": (tensors[0], 7), "b": (None, 8)}, None)
    found = through(nest)
    assert isinstance(found, Nest)
    for one, other in zip(found.tensors, tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert found.named["a"][1] == 7 and found.named["b"] == (None, 8)
    assert nest.tensors is tensors and nest.tensors[0].shape == (4, 3)  # what was taken apart is not changed


def test_a_tensor_that_is_held_twice_travels_once_and_is_one_again() -> None:
    gram = Gram.of(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    nest = Nest([gram.quantized], {"a": (gram.cross, 1)}, gram)
    assert len(take_apart(nest)[1]) == 1
    found = through(nest)
    assert isinstance(found, Nest) and found.gram is not None
    assert found.gram.cross is found.gram.quantized is found.gram.original is found.tensors[0]
    assert found.gram.rows == 5
    twice = found.gram.merge(gram)
    assert torch.equal(twice.quantized, 2 * gram.quantized) and twice.cross is twice.quantized


def test_the_buffers_of_a_module_are_sent_as_bytes_too() -> None:
    quantizer = ActivationQuantizer(QuantSpec.parse("int4:tensor:asym")).set((torch.tensor([0.5]), torch.tensor([3.0])))
    rest, tensors = take_apart([quantizer])
    assert len(tensors) == len(list(quantizer.buffers())) > 0
    (found,) = put_together(rest, [tensor.clone() for tensor in tensors])
    x = torch.linspace(-1, 4, 7)[None]
    assert torch.equal(found(x), quantizer(x))
    quantizer.set((torch.tensor([1.0]), torch.tensor([0.0])))
    assert not torch.equal(found(x), quantizer(x))  # it is another one
