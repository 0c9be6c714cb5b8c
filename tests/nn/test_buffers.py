"""Buffers that keep dtype and value."""

import torch
from torch import nn

from dither.nn.buffers import FixedBuffers


class Stored(FixedBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1e-9))
        self.register_buffer("codes", torch.tensor([1, 2], dtype=torch.uint8))
        self.inner = nn.BatchNorm1d(2)


def test_own_buffers_keep_dtype_and_value_while_the_rest_of_the_network_changes() -> None:
    model = nn.Sequential(Stored(), nn.Linear(2, 2)).half()
    stored = model[0]
    assert stored.get_buffer("scale").dtype == torch.float32 and float(stored.get_buffer("scale")) == float(
        torch.tensor(1e-9)
    )
    assert stored.get_buffer("codes").tolist() == [1, 2]
    assert stored.get_buffer("inner.running_mean").dtype == torch.float16
    assert model[1].weight.dtype == torch.float16


def test_buffers_move_between_devices() -> None:
    stored = Stored().to("meta", torch.float16)
    assert stored.get_buffer("scale").device.type == "meta"
    assert stored.get_buffer("scale").dtype == torch.float32
    assert stored.to_empty(device="cpu").get_buffer("codes").shape == (2,)
