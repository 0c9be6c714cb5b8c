"""The structure of a quantized network as plain data that rebuilds it."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dither
from dither.errors import StorageError
from dither.models.structure import describe, rebuild


@pytest.mark.parametrize("activations", ["none", "int4", "int8:token"])
@pytest.mark.parametrize("method", ["rtn", "erq"])
def test_a_rebuilt_network_takes_the_state_and_computes_the_same(
    odd: Callable[..., Any], method: str, activations: str
) -> None:
    network = odd()
    kind = dither.METHODS[method]
    result = dither.quantize(network.model, kind(activations=activations), network.batch(4))
    structure = json.loads(json.dumps(describe(result.model)))
    again = copy.deepcopy(network.model)
    rebuild(again, structure)
    again.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(network.logits(network.batch(3), again), network.logits(network.batch(3), result.model))
    assert describe(again) == structure


def test_a_skeleton_that_does_not_fit_is_refused_with_the_module(odd: Callable[..., Any]) -> None:
    network = odd()
    structure = describe(dither.quantize(network.model, "rtn", network.batch(2)).model)
    with pytest.raises(StorageError, match=r"names 'blocks\.1\.qkv', which Mlp does not have"):
        rebuild(odd(depth=1).model, structure)
    with pytest.raises(StorageError, match="expected quantization schema 1, got 2; update dither"):
        rebuild(odd().model, structure | {"schema": 2})
    wrong = {**structure, "layers": {"blocks.0.norm1": structure["layers"]["head"]}}
    with pytest.raises(StorageError, match=r"blocks\.0\.norm1 is stored as a quantized layer, but is a LayerNorm here"):
        rebuild(odd().model, wrong)
