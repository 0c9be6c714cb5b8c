"""ONNX: MatMulNBits over our codes, run in ONNX Runtime to equal logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tests.export.conftest import logits, tokens

import dither
from dither.errors import InputError, SpecError, StorageError
from dither.export import onnx as module
from dither.export.integers import IntegerWeight
from dither.export.onnx import block_size, packed_codes
from dither.export.sessions import open_session

Quantized = Callable[..., dither.Result]


def run(folder: Path, **inputs: Any) -> Any:
    """The logits of ONNX Runtime."""
    session = open_session(folder / "model.onnx")
    return session.run(["logits"], inputs)[0]


def test_codes_of_a_block_begin_in_the_lowest_bits() -> None:
    codes = torch.arange(18, dtype=torch.uint8)[None] % 16
    found = packed_codes(codes, 16, 4)
    assert found.shape == (1, 2, 8)
    assert found[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert found[0, 1].tolist() == [0x10, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("group", "size"), [(None, 128), (128, 128), (256, 128), (48, 16), (32, 32), (24, 8)])
def test_blocks_are_the_powers_of_two_that_groups_consist_of(group: int | None, size: int) -> None:
    columns = group or 64
    scale = torch.ones(1, 1)
    weight = IntegerWeight(torch.zeros(1, columns, dtype=torch.uint8), scale, scale.int(), 4, group, False, False)
    assert block_size(weight) == size


@pytest.mark.slow
def test_onnx_runtime_computes_the_same_logits(quantized: Quantized, tmp_path: Path) -> None:
    """At another batch and length than the one that was traced, in every width, with and without zero-points."""
    result = quantized("int4:g32:sym", overrides={"*.down_proj": "int8:channel:asym", "*.v_proj": "int2:g16:asym"})
    report = dither.export(result, "onnx", tmp_path / "onnx")
    assert report["largest_change"] == 0
    batch = tokens(3, 12, seed=5)
    assert np.allclose(run(tmp_path / "onnx", input_ids=batch.numpy()), logits(result.model, batch), atol=1e-4)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 14
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_vision_model_with_biases(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("ViTForImageClassification", num_hidden_layers=1)
    method = dither.RTN(weights="int4:g16:asym", activations="none", skip=["*patch_embeddings*"])
    result = dither.quantize(network.model, method, network.batch(2))
    dither.export(result, "onnx", tmp_path / "onnx")
    batch = network.batch(5, seed=3)
    assert np.allclose(
        run(tmp_path / "onnx", pixel_values=batch.numpy()), network.logits(batch, result.model), atol=1e-4
    )


def test_what_it_cannot_hold_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    for weights, reason in {"int3:g32:sym": "it has 2, 4, 8 bits", "int4:g8:sym": "powers of two from 16 on"}.items():
        with pytest.raises(SpecError, match=reason):
            dither.export(quantized(weights), "onnx", tmp_path / "onnx")
    with pytest.raises(InputError, match="expected float32 or float16, got bfloat16"):
        dither.export(quantized("int4:sym"), "onnx", tmp_path / "onnx", dtype="bfloat16")


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_found(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "dequantized", lambda weight: torch.ones(weight.codes.shape))
    with pytest.raises(StorageError, match="ONNX Runtime's logits differ from torch's"):
        dither.export(quantized("int4:g32:sym"), "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
