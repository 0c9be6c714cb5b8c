"""What each sensitivity measures, against the definition computed plainly; nothing of a measurement stays behind."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention
from torch import nn
from torch.nn import functional

from dither.allocation.table import Option, ScoreTable
from dither.errors import InputError
from dither.formats.fit import fit_grid
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.provenance import model_sha256
from dither.sensitivities import SENSITIVITIES, parse_sensitivity
from dither.sensitivities.hawq import HawqV2
from dither.sensitivities.kl import KL
from dither.sensitivities.quadratic import fisher_noise
from dither.sensitivity import measure

FORMATS = ("int2:channel:asym:minmax", "int4:channel:asym:minmax", "none")


@pytest.fixture(name="odd_table")
def measured_on_odd(odd: Callable[..., Any]) -> Callable[..., tuple[Any, ScoreTable]]:
    def make(sensitivity: Any, options: Any = FORMATS, samples: int = 4, **how: Any) -> tuple[Any, ScoreTable]:
        network = odd(depth=1)
        batches = [network.batch(samples // 2, seed=1), network.batch(samples // 2, seed=2)]
        return network, measure(network.model, sensitivity, batches, options=options, **how)

    return make


def stored(weight: torch.Tensor, text: str) -> torch.Tensor:
    return quantize(weight, fit_grid(weight, QuantSpec.parse(text))).dequantize()


@pytest.mark.parametrize("name", ["kl", "fisher", "quadratic", "error", "hawq-v2+probes=2"])
def test_a_measurement_leaves_the_model_as_it_was_and_more_bits_cost_less(name: str, odd_table: Any) -> None:
    _, table = odd_table(name)
    again = odd_table(name)[1]
    assert (table.scores[:, 0] > table.scores[:, 1]).all()
    assert (table.scores[:, 1] > 0).all()
    assert (table.scores[:, 2] == 0).all()
    np.testing.assert_array_equal(table.scores, again.scores)
    assert table.layers == ("stem", "blocks.0.qkv", "blocks.0.proj", "blocks.0.fc1", "blocks.0.fc2", "head")


@pytest.mark.parametrize("name", sorted(SENSITIVITIES))
def test_the_network_that_is_probed_is_put_back_to_the_last_bit(
    name: str, odd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither import sensitivity

    seen = []
    begin = sensitivity.begin

    def watched(*arguments: Any) -> Any:
        run, source = begin(*arguments)
        seen.append((run.network.model, model_sha256(run.network.tensors())))
        return run, source

    monkeypatch.setattr(sensitivity, "begin", watched)
    network = odd(depth=1)
    text = "hawq-v2+probes=2" if name == "hawq-v2" else name
    measure(network.model, text, [network.batch(2)], options=["int2/int4:tensor:asym", "int3"])
    model, before = seen[0]
    assert model_sha256(model.state_dict().items()) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(network.batch(2)).requires_grad


def test_kl_is_the_mean_divergence_with_one_unit_quantized(odd_table: Any) -> None:
    network, table = odd_table(KL())
    model, batches = network.model, [network.batch(2, seed=1), network.batch(2, seed=2)]
    with torch.no_grad():
        before = torch.cat([model(batch) for batch in batches])
        layer = model.blocks[0].fc1
        layer.weight.copy_(stored(layer.weight, FORMATS[0]))
        after = torch.cat([model(batch) for batch in batches])
    rows = functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert table.scores[3, 0] == pytest.approx(float(rows.mean()), rel=1e-4)
    assert table.errors is not None
    assert table.errors[3, 0] == pytest.approx(float(rows.std() / 2), rel=1e-4)


def test_symmetric_kl_averages_both_directions(odd_table: Any) -> None:
    one, other = odd_table("kl")[1], odd_table("kl+symmetric=true")[1]
    assert other.facts["settings"] == {"symmetric": True}
    assert (one.scores[:, 0] != other.scores[:, 0]).all()


def test_fisher_is_squared_gradient_times_squared_error_of_outputs(odd_table: Any) -> None:
    network, table = odd_table("fisher")
    model, found = network.model, 0.0
    for seed in (1, 2):
        for sample in network.batch(2, seed=seed):
            kept: list[torch.Tensor] = []
            layer = model.blocks[0].fc1
            handle = layer.register_forward_hook(lambda _m, x, y, kept=kept: kept.extend([x[0], y]))
            logits = model(sample[None])
            handle.remove()
            loss = functional.cross_entropy(logits, logits.detach().argmax(-1))
            (gradient,) = torch.autograd.grad(loss, kept[1])
            error = functional.linear(kept[0], stored(layer.weight.detach(), FORMATS[0]) - layer.weight).detach()
            found += float((gradient * error).double().square().sum()) / 4
    assert table.scores[3, 0] == pytest.approx(found, rel=1e-3)


def test_output_error_is_relative_and_gptq_has_less_of_it(odd_table: Any) -> None:
    network, table = odd_table("error")
    inputs = torch.cat([network.batch(2, seed=1), network.batch(2, seed=2)]).flatten(0, 1)
    layer = network.model.stem
    change = inputs @ (stored(layer.weight.detach(), FORMATS[0]) - layer.weight.detach()).T
    expected = float(change.square().sum() / layer(inputs).detach().square().sum())
    assert table.scores[0, 0] == pytest.approx(expected, rel=1e-3)
    _, columns = odd_table("error", method="gptq")
    assert columns.scores[:, 0].sum() < table.scores[:, 0].sum()


class Quadratic(nn.Module):
    """Two layers whose loss is a quadratic of their weights, with a Hessian that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def exact_traces(model: nn.Module, batch: Any) -> dict[str, float]:
    """The trace of each layer's block of the Hessian, entry by entry."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(name: str, value: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, {**parameters, name: value}, (batch,))
        return functional.cross_entropy(logits, logits.detach().argmax(-1))

    return {name.removesuffix(".weight"): full_trace(partial(loss, name), value) for name, value in parameters.items()}


def full_trace(loss: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> float:
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        hessian = torch.autograd.functional.hessian(loss, value)
    return float(hessian.reshape(value.numel(), value.numel()).diagonal().sum())  # type: ignore[union-attr]


def test_hutchinson_finds_the_trace_of_every_layer_at_once() -> None:
    model = Quadratic().eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    batch = torch.randn(6, 3, generator=generator)
    exact = exact_traces(model, batch)
    table = measure(model, HawqV2(probes=400, relative=0.0), [batch[:4], batch[4:]], options=["int2", "none"])
    assert table.facts["draws"] == 400
    for name, trace in table.facts["traces"].items():
        error = table.facts["relative_error"][name] * abs(trace)
        assert abs(trace - exact[name]) < 3 * error
    assert table.priority is not None
    assert table.priority[0] == pytest.approx(table.facts["traces"]["one"] / 12)


def test_omega_is_the_mean_trace_times_the_squared_error(odd_table: Any) -> None:
    network, table = odd_table("hawq-v2+probes=3")
    weight = network.model.head.weight.detach()
    moved = float((stored(weight, FORMATS[0]) - weight).square().sum())
    trace = max(table.facts["traces"]["head"], 0.0)
    if trace:  # a negative one is raised
        assert table.scores[5, 0] == pytest.approx(trace / weight.numel() * moved, rel=1e-4)
    assert table.priority is not None
    assert (table.priority > 0).all()


def test_traces_of_inputs_of_a_batch_are_the_mean_of_those_of_its_samples(odd: Callable[..., Any]) -> None:
    from dither.models.curvature import input_traces
    from dither.models.gradients import Gradients

    network, layers = odd(depth=1), ["stem", "head"]

    def exact(batch: torch.Tensor) -> float:
        def loss(x: torch.Tensor) -> torch.Tensor:
            logits = network.model(x)
            return functional.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")

        return full_trace(loss, batch) / len(batch)

    batch = network.batch(2, seed=1)
    both = exact(batch)
    assert both == pytest.approx((exact(batch[:1]) + exact(batch[1:])) / 2, rel=1e-4)
    gradients = Gradients(network.model, network.model, [batch])
    draws = [input_traces(gradients, layers, seed)["stem"] for seed in range(200)]
    values = torch.tensor([trace for trace, _ in draws])
    assert draws[0][1] == batch[0].numel()
    assert abs(float(values.mean()) - both) < 3 * float(values.std()) / 200**0.5


@pytest.mark.parametrize("name", ["kl", "fisher", "quadratic", "error", "hawq-v2+probes=2"])
def test_formats_of_inputs_cost_too(name: str, odd_table: Any) -> None:
    _, table = odd_table(name, ["int4/int2:tensor:asym:minmax", "int4/int8:tensor:asym:minmax", "int4"])
    assert (table.scores[:, 0] > table.scores[:, 1]).all()
    assert (table.scores[:, 1] != table.scores[:, 2]).all()
    assert (table.costs["bops"][:, 0] * 8 == table.costs["bops"][:, 2]).all()
    assert table.options[0].activations == QuantSpec.parse("int2:tensor:asym:minmax")


@pytest.mark.parametrize("name", ["kl", "fisher", "quadratic", "error", "hawq-v2+probes=3"])
def test_a_killed_measurement_goes_on_where_it_was(
    name: str, odd_table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.sensitivities.base import Kept

    whole, computed, limit = odd_table(name)[1], list[str](), [2]
    call = Kept.__call__

    def counted(self: Kept, part: str, compute: Callable[[], Any]) -> Any:
        def really() -> Any:
            if len(computed) == limit[0]:
                raise KeyboardInterrupt
            computed.append(part)
            return compute()

        return call(self, part, really)

    monkeypatch.setattr(Kept, "__call__", counted)
    limit[0] = 1
    with pytest.raises(KeyboardInterrupt):
        odd_table(name, scores=tmp_path)
    limit[0] = 1000
    resumed = odd_table(name, scores=tmp_path)[1]
    assert len(computed) == len(set(computed)) > 1
    np.testing.assert_array_equal(resumed.scores, whole.scores)
    before = len(computed)
    known = odd_table(name, scores=tmp_path)[1]
    assert len(computed) == before
    assert known.to_data() == resumed.to_data()
    (table,) = tmp_path.rglob("table.json")
    assert ScoreTable.from_data(json.loads(table.read_text())).units == whole.units
    assert not list(tmp_path.rglob("parts"))


def test_layers_that_read_the_same_tensor_are_one_unit(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    table = measure(network.model, "error", [network.batch(2)], options=["int4", "int2"])
    first = [unit for unit in table.units if ".0." in unit.name]
    assert [tuple(name.rsplit(".", 1)[-1] for name in unit.layers) for unit in first] == [
        ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",),
    ]  # fmt: skip
    assert first[0].name == "model.layers.0.self_attn.{q_proj,k_proj,v_proj}"
    assert first[0].parameters == 32 * (32 + 16 + 16)
    assert {part.name for part in table.fixed} == {"lm_head", "the rest"}


def test_a_convolution_and_the_shortcut_beside_it_are_one_unit_as_in_hawq_v3(tiny: Callable[..., Any]) -> None:
    network = tiny("ResNetForImageClassification")
    table = measure(network.model, "fisher", [network.batch(2)], options=["int4", "int8"])
    pairs = [unit.layers for unit in table.units if len(unit.layers) > 1]
    assert pairs
    assert all(any("shortcut" in name for name in layers) and len(layers) == 2 for layers in pairs)


def test_experts_of_a_block_are_one_unit(tiny: Callable[..., Any]) -> None:
    network = tiny("MixtralForCausalLM")
    table = measure(network.model, "error", [network.batch(3)], options=["int4", "int2"])
    experts = [unit for unit in table.units if "experts" in unit.name]
    assert len(experts) == 2
    assert all(len(unit.layers) == 4 * 2 for unit in experts)


def test_the_user_can_tie_and_skip_layers(odd_table: Any) -> None:
    _, table = odd_table("error", ties=["*.fc1,*.fc2"], skip=["head"])
    assert ("blocks.0.fc1", "blocks.0.fc2") in [unit.layers for unit in table.units]
    assert "head" in [part.name for part in table.fixed]
    assert "head" not in table.layers


def test_sizes_are_those_that_a_quantization_stores(odd_table: Any) -> None:
    from dither.pipeline import quantize as run

    network, table = odd_table("error")
    for place, text in enumerate(FORMATS[:2]):
        report = run(network.model, "rtn+weights=" + text, [network.batch(2)]).report.data
        stored_bits = {row["name"]: 8 * row["nbytes"] for row in report["layers"]}
        for unit, bits in zip(table.units, table.costs["size"][:, place], strict=True):
            assert bits == sum(stored_bits[name] for name in unit.layers)
    total = sum(part.bits for part in table.fixed) + table.costs["size"][:, 2].sum()
    assert total == 8 * sum(p.numel() * p.element_size() for p in network.model.parameters())


def test_multiplications_are_counted(odd_table: Any) -> None:
    _, table = odd_table("error")
    assert table.costs["bops"][0, 0] == 6 * 7 * 12 * 2 * 16  # 6 tokens, 7 inputs, 12 outputs, 2 bits times 16
    assert table.costs["activations"][0, 0] == 6 * 7 * 16


def test_a_group_that_does_not_divide_is_no_option_for_that_unit(odd_table: Any) -> None:
    _, table = odd_table("error", ["int4:g12", "int8:channel"])
    assert np.isfinite(table.scores[:, 0]).tolist() == [False, True, True, True, False, True]
    with pytest.raises(InputError, match="stem can be stored as none of the options"):
        odd_table("error", ["int4:g12"])


def test_measured_times_are_costs_and_missing_ones_are_named(odd_table: Any) -> None:
    times = {"int4:channel:asym:percentile": 2.0, "int8:channel:asym:percentile": 3.5}
    shapes = ("12x7", "36x12", "12x12", "17x12", "12x17")
    latency = {**dict.fromkeys(shapes, times), "head": {**times, "int4:channel:asym:percentile": 9.0}}
    _, table = odd_table("error", ["int4", "int8"], latency=latency)
    assert table.costs["latency"].tolist() == [[2.0, 3.5]] * 5 + [[9.0, 3.5]]
    latency.pop("12x17")
    with pytest.raises(InputError, match=r"no time of blocks.0.fc2 \(12x17\) as int4"):
        odd_table("error", ["int4", "int8"], latency=latency)


def test_unknown_names_are_refused_with_the_nearest(odd_table: Any) -> None:
    with pytest.raises(InputError, match="did you mean 'fisher'"):
        parse_sensitivity("fischer")
    with pytest.raises(InputError, match="did you mean 'probes'"):
        parse_sensitivity("hawq-v2+probe=3")
    with pytest.raises(InputError, match="different formats"):
        odd_table("error", ["int4", "int4"])


def test_options_mean_what_they_mean_for_the_method(odd_table: Any) -> None:
    _, table = odd_table("error", ["int4"], method="hqq")
    assert table.options == (Option(QuantSpec.parse("int4:channel:asym:tight:realzero")),)
    with pytest.raises(InputError, match="gptq stores weights as one of"):
        odd_table("error", ["nuq4"], method="gptq")


def test_a_model_larger_than_memory_can_be_measured_by_output_errors(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("LlamaForCausalLM")
    network.model.save_pretrained(tmp_path / "llama")
    how: dict[str, Any] = {"options": ["int2", "int4"]}
    batches = [network.batch(2)]
    whole = measure(tmp_path / "llama", "error", batches, **how)
    streamed = measure(tmp_path / "llama", "error", batches, stream=True, **how)
    np.testing.assert_array_equal(streamed.scores, whole.scores)
    np.testing.assert_array_equal(streamed.costs["size"], whole.costs["size"])
    assert streamed.fixed == whole.fixed
    for name in ("kl", "fisher", "hawq-v2"):
        with pytest.raises(InputError, match="gradients need all weights|read block by block"):  # noqa: RUF043
            measure(tmp_path / "llama", name, batches, stream=True, **how)


def test_small_errors_cost_the_divergence_that_is_predicted_to_second_order(odd_table: Any) -> None:
    options = ["int8:channel:asym:minmax", "int6:channel:asym:minmax"]
    measured, predicted = odd_table("kl", options)[1], odd_table("quadratic+draws=300", options)[1]
    assert predicted.errors is not None
    np.testing.assert_array_less(
        np.abs(predicted.scores - measured.scores), 4 * predicted.errors + 0.05 * measured.scores
    )
    np.testing.assert_array_less(predicted.errors, 0.2 * predicted.scores)


def test_noise_has_the_covariance_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.3]])
    generator = torch.Generator().manual_seed(0)
    v = fisher_noise(logits.expand(20000, 3), generator)
    p = logits.softmax(1)[0]
    torch.testing.assert_close(v.T @ v / len(v), torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.01)
    torch.testing.assert_close(v.sum(1), torch.zeros(len(v)), rtol=0, atol=1e-6)


class Residual(nn.Module):
    """Sums and an activation that write over what layers were given and gave, or make new tensors."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.third, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            x = self.first(x).relu_()
            y = self.second(x)
            y += x
            y += self.third(y)
            return self.head(y)
        x = self.first(x).relu()
        y = self.second(x) + x
        return self.head(y + self.third(y))


@pytest.mark.parametrize("name", ["kl", "fisher", "quadratic", "error"])
def test_sums_in_place_change_no_score(name: str) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    here, apart = (
        measure(Residual(in_place).eval(), name, [x], options=["int2:channel", "int6:channel"])
        for in_place in (True, False)
    )
    np.testing.assert_allclose(here.scores, apart.scores, rtol=1e-4)
