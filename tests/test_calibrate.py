"""Steps that methods share: folds keep the function, measurements equal explicit ones."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.calibrate import LayerTask, measure, quantize_operands, reparameterize
from dither.formats.spec import QuantSpec
from dither.methods import GPTQ
from dither.models.anatomy import read_anatomy
from dither.models.network import Network
from dither.nn.linear import QuantizedLinear
from dither.walk import Block, walk

INT4 = QuantSpec.parse("int4:tensor:asym:percentile")


def visit(network: Any, batches: list[Any], inputs: str = "fp") -> Iterator[Block]:
    run = Network(network.model, "tiny").run
    anatomy = read_anatomy(network.model, lambda: run(batches[0]))
    with torch.no_grad():
        yield from walk(network.model, anatomy, run, batches, inputs)  # type: ignore[arg-type]


def output(block: Block) -> Tensor:
    found = block.once()
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize(
    "form", ["int4:tensor:asym", "int4:tensor:asym:percentile", "int8:token:asym", "int4:tensor:sym"]
)
@pytest.mark.parametrize(
    ("name", "count"), [("ViTForImageClassification", 2), ("SwinForImageClassification", 2), ("odd", 2)]
)
def test_reparameterizing_keeps_what_the_block_puts_out(
    tiny: Callable[..., Any], odd: Callable[..., Any], name: str, count: int, form: str
) -> None:
    network = odd() if name == "odd" else tiny(name)
    for block in visit(network, [network.batch(4)]):
        if not block.unit.is_block:
            continue
        before = output(block)
        fitted = reparameterize(block, QuantSpec.parse(form), "fp", round_zero_point=True)
        assert float((output(block) - before).norm() / before.norm()) < 1e-4
        assert len([remark for remark in block.remarks.values() if remark.startswith("reparameterized")]) == count
        assert fitted
        for one, two in zip(block.module.parameters(), block.reference.parameters(), strict=True):
            assert torch.equal(one, two)


def test_behind_a_reparameterized_norm_all_channels_have_one_range(tiny: Callable[..., Any]) -> None:
    network = tiny()
    spec = QuantSpec.parse("int8:tensor:asym")
    for block in visit(network, [network.batch(4)]):
        if block.unit.is_block:
            name = block.unit.layers[0]
            fitted = reparameterize(block, spec, "fp", round_zero_point=False)[name]
            seen: list[Tensor] = []
            handle = block.layer(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            block.once()
            handle.remove()
            spread = seen[0].flatten(0, 1).amax(0) - seen[0].flatten(0, 1).amin(0)
            torch.testing.assert_close(spread / spread.mean(), torch.ones_like(spread), rtol=0.02, atol=0)
            assert float((fitted(seen[0]) - seen[0]).abs().max()) <= 0.51 * float(fitted.scale)


def test_norms_that_cannot_be_reparameterized_say_why_and_stay_as_they_are(tiny: Callable[..., Any]) -> None:
    for name, reason in (
        ("LlamaForCausalLM", "the fold changed the block's output (it takes no bias; a symmetric format needs none)"),
        ("BertForSequenceClassification", "something besides the layers intermediate.dense reads its output"),
    ):
        network = tiny(name)
        before = {key: x.clone() for key, x in network.model.state_dict().items()}
        for block in visit(network, [network.batch(2)]):
            assert reparameterize(block, INT4, "fp", round_zero_point=True) == {}
            if block.unit.is_block:
                assert f"not reparameterized: {reason}" in [
                    remark.replace("the layers " + block.unit.name + ".", "the layers ")
                    for remark in block.remarks.values()
                ]
        after = network.model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], x) for key, x in before.items())


def test_a_symmetric_format_reparameterizes_a_norm_without_bias(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    for block in visit(network, [network.batch(2)]):
        if block.unit.is_block:
            reparameterize(block, QuantSpec.parse("int4:tensor:sym"), "fp", round_zero_point=True)
            assert set(block.remarks.values()) == {"reparameterized with 3 layers", "reparameterized with 2 layers"}


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ResNetForImageClassification"])
def test_a_gram_measured_once_for_several_layers_equals_each_layers_own(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    for block in visit(network, [network.batch(2, seed=1), network.batch(3, seed=2)]):
        layers = block.unit.layers
        together, quantizers = measure(block, dict.fromkeys(layers, INT4), "fp", {})
        for task in together:
            (alone,), own = measure(block, {task.name: INT4}, "fp", {})
            assert task.gram is not None
            assert alone.gram is not None
            assert task.gram.rows == alone.gram.rows
            torch.testing.assert_close(task.gram.quantized, alone.gram.quantized, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(task.gram.cross, alone.gram.cross, rtol=1e-12, atol=1e-12)
            assert torch.equal(own[task.name].scale, quantizers[task.name].scale)
        places = [quantizer.scale.data_ptr() for quantizer in quantizers.values()]
        assert len(set(places)) == len(layers)  # stored tensors are not shared


def test_layers_of_a_group_with_other_formats_or_without_bias_are_measured_apart(tiny: Callable[..., Any]) -> None:
    network = tiny()
    network.model.vit.layers[0].attention.k_proj.bias = None
    blocks = iter(visit(network, [network.batch(2)]))
    next(blocks)
    block = next(blocks)
    query, key, value = block.unit.layers[:3]
    tasks, quantizers = measure(block, {query: INT4, key: INT4, value: None}, "fp", {})
    assert [task.gram.quantized.shape[0] for task in tasks if task.gram is not None] == [33, 32, 33]
    assert set(quantizers) == {query, key}
    assert tasks[0].gram is not tasks[2].gram
    assert tasks[2].gram is not None
    assert tasks[2].gram.cross is tasks[2].gram.quantized


def test_patches_are_cut_once_where_both_inputs_are_the_same(tiny: Callable[..., Any]) -> None:
    network = tiny("ResNetForImageClassification")
    block = next(iter(visit(network, [network.batch(2)])))
    (task,), _ = measure(block, dict.fromkeys(block.unit.layers), "fp", {})
    assert task.gram is not None
    assert task.gram.cross is task.gram.quantized is task.gram.original


class Seen:
    """Inputs of each layer of a network, all batches together."""

    def __init__(self, network: Any, model: nn.Module, batches: list[Any], names: list[str]) -> None:
        self.rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for name, rows in self.rows.items():
            model.get_submodule(name).register_forward_pre_hook(
                lambda _m, a, rows=rows: rows.append(a[0].flatten(0, -2))
            )
        for batch in batches:
            network.logits(batch, model)

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.rows[name]).double()


@pytest.mark.parametrize("method", ["rtn", "gptq", "erq"])
def test_the_recorded_output_error_is_that_of_the_stored_layer(tiny: Callable[..., Any], method: str) -> None:
    network = tiny()
    batches = [network.batch(3, seed=1), network.batch(2, seed=2)]
    recipe = dither.METHODS[method](
        weights="int3", activations="int4", attention="none", probabilities="none", inputs="fp"
    )  # fmt: skip
    if method == "erq":
        recipe = recipe.model_copy(update={"reparameterize": False})
    result = dither.quantize(network.model, recipe, batches)
    rows = {row["name"]: row for row in result.report.data["layers"] if row["kind"] == "Linear"}
    full = Seen(network, network.model, batches, list(rows))
    for name, row in rows.items():
        layer, stored = network.model.get_submodule(name), result.model.get_submodule(name)
        assert isinstance(stored, QuantizedLinear)
        x = full[name]
        true = x @ layer.weight.detach().double().T + layer.bias.detach().double()
        seen = stored.quantize_input(x.float()).double()
        mine = seen @ stored.weight.double().T + stored.bias.detach().double()  # type: ignore[union-attr]
        expected = float((true - mine).square().sum() / true.square().sum())
        assert row["output_error"] == pytest.approx(expected, rel=1e-4, abs=1e-10)
        weight = layer.weight.detach().double()
        difference = float((stored.weight.double() - weight).square().sum() / weight.square().sum())
        assert row["weight_error"] == pytest.approx(difference, rel=1e-6)
        assert row["input_range"] == (pytest.approx(float(x.min())), pytest.approx(float(x.max())))


def test_operands_get_quantizers_and_records_only_where_asked(odd: Callable[..., Any]) -> None:
    network = odd()
    blocks = iter(visit(network, [network.batch(2)]))
    next(blocks)
    block = next(blocks)
    spec = QuantSpec.parse("int8:tensor:asym")
    quantize_operands(block, {"query": spec, "key": None, "value": spec, "probabilities": None}, "fp")
    assert [row["operand"] for row in block.operand_records] == ["query", "value"]
    assert all(0 < row["error"] < 1e-3 for row in block.operand_records)
    assert sorted(block.module.attention_operands._modules) == ["query", "value"]


def test_weight_and_bias_are_joined_in_the_precision_of_the_gram() -> None:
    task = LayerTask("fc", torch.ones(2, 3), torch.zeros(2), None)
    assert task.columns == 3
    assert task.with_bias().shape == (2, 4)
    assert task.with_bias().dtype == torch.float64


@pytest.mark.parametrize("groups", [1, 4])
def test_the_gram_of_a_convolution_is_of_what_it_multiplies_and_padding_stays_zero(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.Flatten(), nn.Linear(144, 2)).eval()
    pixels = torch.rand(5, 4, 6, 6) + 1  # a range that does not hold zero
    inputs = "int3:tensor:asym:minmax"
    method = GPTQ(weights="int8:minmax", activations=inputs, entry_activations=inputs)  # type: ignore[arg-type]
    result = dither.quantize(model, method, pixels)
    layer = result.model[0]
    seen = layer.quantize_input(pixels)
    true, found = (
        model[0](pixels),
        torch.nn.functional.conv2d(seen, layer.weight.reshape(4, -1, 3, 3), layer.bias, 1, 1, 1, groups),
    )
    error = float(((found - true).square().sum() / true.square().sum()).detach())
    row = result.report.data["layers"][0]
    assert row["output_error"] == pytest.approx(error, rel=1e-3)
    assert "tries" in row["notes"]  # no nearest rounding for grouped convolutions any more
