"""The quantizer inside transformers: dtypes and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

import dither
from dither.storage import write_network


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    network = tiny(num_hidden_layers=1)
    result = dither.quantize(network.model, dither.ERQ(weights="int4", activations="int4"), network.batch(3))
    write_network(result.network, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_asked_for_in_half_precision_keeps_its_grids(
    tiny: Callable[..., Any], folder: Path, dtype: torch.dtype
) -> None:
    network = tiny()
    full = dither.load(folder)
    half = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype)
    assert torch.equal(half.vit.layers[0].attention.q_proj.packed.qtensor().grid.scale,
                       full.vit.layers[0].attention.q_proj.packed.qtensor().grid.scale)  # fmt: skip
    batch = network.batch(4)
    true, mine = network.logits(batch, full), network.logits(batch.to(dtype), half).float()
    assert mine.isfinite().all()
    assert float((true - mine).norm() / true.norm()) < 0.2


def test_saving_is_left_to_dither(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
