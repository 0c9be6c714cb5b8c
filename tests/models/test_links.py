"""Norm → layer links: found through every rearrangement, refused wherever something else reads the norm's output."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither.models.anatomy import read_anatomy
from dither.models.links import Chain, Links, find_chains, find_links, same_output, shared_inputs
from dither.models.network import Network


def blocks(model: nn.Module, batch: Any) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """Each block with a call of it on the arguments that the model gives it."""
    run = Network(model, "tiny").run
    found = {}
    for unit in (unit for unit in read_anatomy(model, lambda: run(batch)).units if unit.is_block):
        module, calls = model.get_submodule(unit.name), []  # type: ignore[var-annotated]
        handle = module.register_forward_pre_hook(lambda _m, a, k, c=calls: c.append((a, k)), with_kwargs=True)
        with torch.no_grad():
            run(batch)
        handle.remove()
        found[unit.name] = module, lambda m=module, c=calls: m(*c[0][0], **c[0][1])
    return found


def links_of(model: nn.Module, batch: Any) -> dict[str, Links]:
    with torch.no_grad():
        return {name: find_links(module, run) for name, (module, run) in blocks(model, batch).items()}


def as_pairs(links: Links) -> list[tuple[str, tuple[str, ...]]]:
    return [(link.norm, link.layers) for link in links.found]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_both_norms_of_a_vit_block_are_linked(tiny: Callable[..., Any], name: str, attention: str) -> None:
    network = tiny(name, attention=attention)
    for links in links_of(network.model, network.batch(2)).values():
        assert as_pairs(links) == [
            ("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
            ("layernorm_after", ("mlp.fc1",)),
        ]
        assert not links.refused


def test_windows_and_shifts_of_swin_are_seen_through(tiny: Callable[..., Any]) -> None:
    network = tiny("SwinForImageClassification")
    found = links_of(network.model, network.batch(2))
    assert len(found) == 4
    for links in found.values():
        assert [(norm, len(layers)) for norm, layers in as_pairs(links)] == [
            ("layernorm_before", 3),
            ("layernorm_after", 1),
        ]


def test_a_padding_behind_a_norm_is_noticed(tiny: Callable[..., Any]) -> None:
    network = tiny("SwinForImageClassification", image_size=28)  # 14 patches a side do not fill windows of 4
    links = links_of(network.model, network.batch(2, size=28))["swin.encoder.layers.0.blocks.0"]
    assert links.refused == {"layernorm_before": "no layer reads its output channel by channel"}
    assert as_pairs(links)[0][0] == "layernorm_after"


def test_a_padding_beside_huge_values_is_noticed_too(tiny: Callable[..., Any]) -> None:
    network = tiny("SwinForImageClassification", image_size=28)
    with torch.no_grad():
        network.model.swin.encoder.layers[0].blocks[0].layernorm_before.weight[3] = 1e4
    links = links_of(network.model, network.batch(2, size=28))["swin.encoder.layers.0.blocks.0"]
    assert "layernorm_before" in links.refused


def test_post_norm_blocks_are_refused_because_the_residual_reads_the_norm(tiny: Callable[..., Any]) -> None:
    network = tiny("BertForSequenceClassification")
    for links in links_of(network.model, network.batch(2)).values():
        assert not links.found
        assert links.refused == {
            "attention.output.LayerNorm": "something besides the layers intermediate.dense reads its output",
            "output.LayerNorm": "no layer reads its output channel by channel",
        }


class Huge(nn.Module):
    """A norm that a layer and the output read, beside a channel of huge values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x * torch.tensor([1e5] + [1.0] * 7) + self.fc(normed) + normed


def test_a_second_reader_beside_a_huge_channel_is_noticed() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    block = Huge()
    assert find_links(block, lambda: block(x)).refused == {
        "norm": "something besides the layers fc reads its output"
    }  # fmt: skip


def test_rms_norms_are_linked(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    for links in links_of(network.model, network.batch(2)).values():
        assert as_pairs(links) == [
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ]


@pytest.mark.parametrize(
    ("name", "side"), [("ResNetForImageClassification", 32), ("MobileNetV2ForImageClassification", 32)]
)
def test_norms_of_pictures_are_refused_with_a_reason(tiny: Callable[..., Any], name: str, side: int) -> None:
    network = tiny(name)
    for links in links_of(network.model, network.batch(2, size=side)).values():
        assert not links.found
        assert links.refused
        assert all(links.refused.values())


class Picture(nn.Module):
    """As many rows as channels, so that the last axis has the size of the channel axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


def test_a_convolution_is_never_linked_even_where_its_axes_have_equal_sizes() -> None:
    block, x = Picture().eval(), torch.randn(2, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    links = find_links(block, lambda: block(x))
    assert not links.found
    assert set(links.refused) == {"norm"}


def test_a_layer_that_reads_the_norm_at_one_of_two_calls_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.fc(self.norm(x)))

    block, x = Twice(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert not find_links(block, lambda: block(x)).found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_links_are_found_in_every_precision(tiny: Callable[..., Any], dtype: torch.dtype) -> None:
    network = tiny()
    model = network.model.to(dtype)
    links = links_of(model, network.batch(2).to(dtype))
    assert all(len(one.found) == 2 for one in links.values())


def digest(model: nn.Module) -> str:
    state = model.state_dict()
    return hashlib.sha256(b"".join(name.encode() + x.numpy().tobytes() for name, x in state.items())).hexdigest()


def test_probing_leaves_the_model_as_it_was_even_when_it_fails(tiny: Callable[..., Any]) -> None:
    network = tiny()
    before = digest(network.model)
    links_of(network.model, network.batch(2))
    block = network.model.vit.layers[0]
    calls = [0]

    def failing() -> Any:
        calls[0] += 1
        if calls[0] > 1:
            raise RuntimeError("stop")
        return block(torch.ones(1, 3, 32))

    with pytest.raises(RuntimeError, match="stop"):
        find_links(block, failing)
    assert digest(network.model) == before
    for module in network.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_layers_that_read_the_same_rows_are_grouped(tiny: Callable[..., Any]) -> None:
    network = tiny()
    block, run = blocks(network.model, network.batch(2))["vit.layers.0"]
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        groups = shared_inputs(layers, run)
    assert groups == [("attention.q_proj", "attention.k_proj", "attention.v_proj")]


def test_kernels_that_cut_other_patches_from_the_same_picture_are_not_grouped() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    layers: dict[str, nn.Linear | nn.Conv2d] = {
        "a": nn.Conv2d(4, 4, 3, padding=1),
        "dilated": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        "b": nn.Conv2d(4, 6, 3, padding=1, bias=False),
        "strided": nn.Conv2d(4, 4, 1, stride=2),
        "pointwise": nn.Conv2d(4, 4, 1),
    }
    assert shared_inputs(layers, lambda: [layer(x) for layer in layers.values()]) == [("a", "b")]


def test_a_layer_that_is_called_with_something_else_later_is_not_grouped() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    layers: dict[str, nn.Linear | nn.Conv2d] = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    assert shared_inputs(layers, lambda: [layers["a"](x), layers["b"](x), layers["b"](2 * x)]) == []


def test_outputs_differ_when_any_channel_does_and_not_by_rounding() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e4, 1.0, 1.0, 0.0])
    assert same_output((x,), (x * (1 + 1e-5),))
    assert not same_output({"out": x}, {"out": x + torch.tensor([0, 0.01, 0, 0])})
    assert not same_output(x, torch.full_like(x, torch.nan))
    assert same_output(torch.tensor(3.0), torch.tensor(3.0))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("LlamaForCausalLM", {}, [Chain("mlp.up_proj", ("mlp.down_proj",))]),
        (
            "LlamaForCausalLM",
            {"num_key_value_heads": 2},
            [Chain("self_attn.v_proj", ("self_attn.o_proj",)), Chain("mlp.up_proj", ("mlp.down_proj",))],
        ),
        ("ViTForImageClassification", {}, [Chain("attention.v_proj", ("attention.o_proj",))]),
        (
            "ViTForImageClassification",
            {"hidden_act": "relu"},
            [Chain("attention.v_proj", ("attention.o_proj",)), Chain("mlp.fc1", ("mlp.fc2",))],
        ),
    ],
)
def test_values_and_what_passes_a_gate_are_chained_to_their_readers(
    tiny: Callable[..., Any], name: str, settings: dict[str, Any], expected: list[Chain]
) -> None:
    network = tiny(name, **settings)
    with torch.no_grad():
        for module, run in blocks(network.model, network.batch(2)).values():
            assert find_chains(module, run) == expected


def test_layers_on_both_sides_of_a_sum_in_place_share_no_input() -> None:
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)

    def run() -> Tensor:
        x = torch.ones(3, 4)
        x += first(x)
        return last(x)

    with torch.no_grad():
        assert shared_inputs({"first": first, "last": last}, run) == []
