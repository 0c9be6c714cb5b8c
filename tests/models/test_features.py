"""The features of a network count what it is made of."""

from collections.abc import Callable
from typing import Any

import pytest

from dither.models.anatomy import read_anatomy
from dither.models.features import model_features


def found(tiny: Any) -> dict[str, float]:
    return model_features(tiny.model, read_anatomy(tiny.model, lambda: tiny.logits(tiny.batch(1))))


def test_features_tell_a_transformer_from_a_convolutional_network(tiny: Callable[..., Any]) -> None:
    vit, net = found(tiny()), found(tiny("MobileNetV2ForImageClassification"))
    assert vit.keys() == net.keys()
    assert (vit["attentions"], vit["convolutions"], vit["grouped convolutions"], vit["layers"]) == (2, 1, 0, 14)
    assert net["attentions"] == 0
    assert net["convolutions"] > net["grouped convolutions"] > 10
    assert vit["log2 width"] == pytest.approx(5)  # 32 inputs
    deeper = found(tiny(num_hidden_layers=3))
    assert deeper["units"] == vit["units"] + 1
    assert deeper["log10 parameters"] > vit["log10 parameters"]
