"""What a network is made of: units in order, no layer lost, attention found, a reason for all that is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither.errors import InputError
from dither.models.anatomy import Anatomy, read_anatomy
from dither.models.layers import is_layer
from dither.models.network import Network
from dither.models.selection import without

TRANSFORMERS = {
    "ViTForImageClassification": ["vit.layers.0.attention", "vit.layers.1.attention"],
    "DeiTForImageClassification": ["deit.layers.0.attention", "deit.layers.1.attention"],
    "SwinForImageClassification": [
        f"swin.encoder.layers.{i}.blocks.{j}.attention" for i in range(2) for j in range(2)
    ],
    "BertForSequenceClassification": [f"bert.encoder.layer.{i}.attention.self" for i in range(2)],
    "LlamaForCausalLM": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "SegformerForImageClassification": [f"segformer.stages.{i}.blocks.0.attention" for i in range(2)],
}  # fmt: skip
CONVOLUTIONS = ["ConvNextForImageClassification", "ResNetForImageClassification", "MobileNetV2ForImageClassification"]


def read(model: nn.Module, batch: Any) -> Anatomy:
    return read_anatomy(model, lambda: Network(model, "tiny").run(batch))


def all_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_layer(module)}


@pytest.mark.parametrize("name", [*TRANSFORMERS, *CONVOLUTIONS, "AlbertForSequenceClassification"])
def test_every_layer_is_in_one_unit_or_kept_and_units_come_in_execution_order(
    tiny: Callable[..., Any], name: str
) -> None:
    network = tiny(name)
    anatomy = read(network.model, network.batch(2))
    assert len(anatomy.layers) == len(set(anatomy.layers))
    assert set(anatomy.layers) | set(anatomy.kept) == all_layers(network.model)
    assert not set(anatomy.layers) & set(anatomy.kept)
    order: list[str] = []
    for unit in anatomy.units:
        module = network.model.get_submodule(unit.name)
        module.register_forward_pre_hook(lambda _m, _a, unit=unit.name: order.append(unit))
    network.logits(network.batch(1))
    assert order == [unit.name for unit in anatomy.units]
    assert anatomy.entry == anatomy.layers[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_module_that_computes_attention_is_found_in_every_implementation(
    tiny: Callable[..., Any], name: str, attention: str
) -> None:
    network = tiny(name, attention=attention)
    anatomy = read(network.model, network.batch(2))
    assert [owner for unit in anatomy.units for owner in unit.attention] == TRANSFORMERS[name]
    blocks = [unit for unit in anatomy.units if unit.is_block]
    assert len(blocks) == len(TRANSFORMERS[name])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_network_has_blocks_and_no_attention(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    anatomy = read(network.model, network.batch(2))
    assert sum(unit.is_block for unit in anatomy.units) > 1
    assert all(unit.attention == () for unit in anatomy.units)


def test_layers_of_a_block_are_in_the_order_in_which_they_run(tiny: Callable[..., Any]) -> None:
    network = tiny()
    anatomy = read(network.model, network.batch(2))
    names = [name.rpartition(".")[2] for name in anatomy.units[1].layers]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def test_a_block_that_runs_again_and_again_is_kept_with_the_reason(tiny: Callable[..., Any]) -> None:
    network = tiny("AlbertForSequenceClassification")
    anatomy = read(network.model, network.batch(2))
    assert len(anatomy.kept) == 6
    assert all("runs 2 times in one forward pass (shared weights)" in reason for reason in anatomy.kept.values())


class Strange(nn.Module):
    """A layer that never runs, and one that runs twice outside of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.once = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(self.twice(x)))


def test_layers_that_never_run_or_run_twice_outside_of_a_block_are_kept_with_the_reason() -> None:
    anatomy = read(Strange(), torch.ones(1, 4))
    assert anatomy.layers == ("once",)
    assert anatomy.kept["never"] == "never called in the forward pass"
    assert anatomy.kept["twice"] == "runs 2 times in one forward pass outside of a block"


def test_a_block_without_layers_that_run_is_no_unit(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    anatomy = read(network.model, network.batch(2))
    assert [unit.name for unit in without(anatomy, ["blocks.*"]).units] == ["stem", "head"]


def test_a_block_that_computes_attention_itself_is_its_own_owner(odd: Callable[..., Any]) -> None:
    network = odd()
    assert [unit.attention for unit in read(network.model, network.batch(2)).units] == [
        (), ("blocks.0",), ("blocks.1",), (),
    ]  # fmt: skip


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"LayerNorm has no Linear or Conv2d layer"):
        read(nn.LayerNorm(4), torch.ones(1, 4))


def test_reading_leaves_no_hooks_behind(tiny: Callable[..., Any]) -> None:
    network = tiny()
    read(network.model, network.batch(2))
    with pytest.raises(InputError, match=r"ViTForImageClassification fails on the first calibration batch: .*99"):
        read(network.model, torch.ones(1, 3, 99, 99))
    for module in network.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
