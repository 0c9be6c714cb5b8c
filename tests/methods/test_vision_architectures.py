"""Vision classes of transformers from configurations with random weights: found, covered, quantized, loaded again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.recipe import build_method

SHORT: dict[str, dict[str, Any]] = {
    "ptq4vit": {"candidates": 8, "rounds": 1, "rows": 64},
    "noisyquant": {"candidates": 8, "reaches": 4, "rows": 64},
    "repquant": {"iterations": 3, "clip_steps": 5},
}
OPERANDS = {  # four for each attention
    "SwinForImageClassification": 16,
    "DeiTForImageClassification": 8,
    "SegformerForImageClassification": 8,
    "ConvNextForImageClassification": 0,
    "segmentation": 8,
    "detection": 12,  # the decoder has two
}


def segmentation() -> nn.Module:
    """SegFormer with the head that puts the maps of all stages together."""
    from transformers import AutoModelForSemanticSegmentation, SegformerConfig

    config = SegformerConfig(
        depths=[1, 1], hidden_sizes=[16, 16], num_attention_heads=[1, 2], sr_ratios=[2, 1], num_encoder_blocks=2,
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    made: nn.Module = AutoModelForSemanticSegmentation.from_config(config)
    return made


def detection() -> nn.Module:
    """DETR on a residual backbone of transformers' own, whose batch normalization is frozen."""
    from transformers import AutoModelForObjectDetection, DetrConfig, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, use_pretrained_backbone=False, backbone=None, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, num_queries=5, num_labels=3,
    )  # fmt: skip
    made: nn.Module = AutoModelForObjectDetection.from_config(config)
    return made


@pytest.fixture
def network(tiny: Callable[..., Any], request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A network by its name in OPERANDS, and two pictures."""
    from tests.conftest import randomize

    if request.param in ("segmentation", "detection"):
        made = segmentation() if request.param == "segmentation" else detection()
        return randomize(made), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one = tiny(request.param)
    return one.model, one.batch(2)


def said(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """The tensors that count: logits and, of a detector, boxes."""
    with torch.no_grad():
        output = model(pixels)
    return [output[key] for key in ("logits", "pred_boxes") if key in output]


@pytest.mark.parametrize("method", SHORT)
@pytest.mark.parametrize(("network", "kind"), [(kind, kind) for kind in OPERANDS], indirect=["network"])
def test_every_layer_is_covered_and_the_result_loads(
    network: tuple[nn.Module, Tensor], kind: str, method: str, tmp_path: Path
) -> None:
    model, pixels = network
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    fields = {"weights": "int8:minmax", "activations": "int8:minmax", **SHORT[method]}
    result = dither.quantize(tmp_path / "model", build_method(method, fields), pixels, output=tmp_path / "out")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    rows = {row["name"]: row for row in result.report.data["coverage"]}
    assert {row["name"] for row in result.report.data["layers"]} == set(layers) <= set(rows)
    assert not [row for row in rows.values() if row["reason"] == "not reached by the walk"]
    assert len(result.report.data["operands"]) == OPERANDS[kind]
    true, mine, again = (said(one, pixels) for one in (model, result.model, dither.load(tmp_path / "out")))
    for expected, found, loaded in zip(true, mine, again, strict=True):
        assert torch.equal(found, loaded)
        assert float((found - expected).norm() / expected.norm()) < 0.1  # measured: 0.01 to 0.06
