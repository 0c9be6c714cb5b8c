"""From a model to an allocation, and from that to a quantized model of just those bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dither
from dither.allocating import ALLOCATORS, allocate, allocator_named
from dither.allocation.allocation import Allocation
from dither.allocation.table import ScoreTable
from dither.allocations import allocated, read_allocation, write_allocation
from dither.errors import InputError, PathError
from dither.methods import METHODS, Method
from dither.recipe import build_method, from_data, resolved
from dither.sensitivity import measure

OPTIONS = ["int2:channel", "int4:channel", "int8:channel"]


@pytest.fixture(name="network")
def one_block(odd: Callable[..., Any]) -> Any:
    return odd(depth=1)


@pytest.fixture(name="table")
def of_errors(network: Any) -> ScoreTable:
    return measure(network.model, "error", [network.batch(4)], options=OPTIONS)


@pytest.mark.parametrize("method", ["rtn", "gptq", "erq+dual=false", "hqq"])
def test_any_method_keeps_the_promise_of_an_allocation(
    method: str, network: Any, table: ScoreTable, tmp_path: Path
) -> None:
    bits = dither.allocate(table, bits=7.0)
    assert len({str(option) for option in bits.layers.values()}) > 1
    result = dither.quantize(network.model, method, [network.batch(4)], allocation=bits, output=tmp_path / "out")
    report = result.report.data
    assert report["allocation"]["as_promised"]
    assert report["allocation"]["same_model"]
    assert report["totals"]["bits_per_weight"] == pytest.approx(bits.bits) == report["allocation"]["achieved_bits"]
    assert {row["name"]: row["weights"] for row in report["layers"]} == {
        name: str(option.weights) for name, option in bits.layers.items()
    }
    recipe = from_data(resolved(result.method), "the saved recipe")
    assert recipe == result.method


def test_what_a_method_stores_beside_codes_was_not_promised(network: Any, table: ScoreTable) -> None:
    bits = dither.allocate(table, bits=7.0)
    report = dither.quantize(network.model, "lorc", [network.batch(4)], allocation=bits).report.data["allocation"]
    assert not report["as_promised"]
    assert report["achieved_bits"] > report["promised_bits"]


def test_an_allocation_of_another_model_is_noticed(table: ScoreTable, odd: Callable[..., Any]) -> None:
    other = odd(depth=1, seed=5)
    report = dither.quantize(other.model, "rtn", [other.batch(4)], allocation=dither.allocate(table, bits=7.0))
    assert not report.report.data["allocation"]["same_model"]


def test_an_allocation_for_other_layers_is_refused(table: ScoreTable, tiny: Callable[..., Any]) -> None:
    other = tiny()
    with pytest.raises(InputError, match="matches no layer"):
        dither.quantize(other.model, "rtn", [other.batch(1)], allocation=dither.allocate(table, bits=7.0))


def test_layers_in_full_precision_and_formats_of_inputs_are_applied(network: Any) -> None:
    table = measure(network.model, "error", [network.batch(4)], options=["int2/int4:tensor:asym", "none"])
    bits = allocate(table, bits=12.0)
    assert bits.kept()
    result = dither.quantize(network.model, "erq+activations=int8", [network.batch(4)], allocation=bits)
    done = {row["name"]: row["activations"] for row in result.report.data["layers"]}
    assert set(done) == set(bits.layers) - set(bits.kept())
    assert set(done.values()) == {"int4:tensor:asym:percentile"}
    assert result.report.data["allocation"]["as_promised"]


def test_overrides_and_skips_that_a_method_has_already_win(network: Any, table: ScoreTable) -> None:
    bits = dither.allocate(table, bits=7.0)
    method = allocated(build_method("rtn", {"overrides": {"*.fc1": "int3:channel"}, "skip": ["stem"]}), bits)
    assert method.weight_spec("blocks.0.fc1").bits == 3
    assert method.weight_spec("head") == bits.layers["head"].weights
    assert method.skip == ("stem",)


def test_a_format_that_a_method_cannot_store_is_refused(network: Any) -> None:
    table = measure(network.model, "error", [network.batch(4)], options=["nuq3", "nuq4"], method="squeezellm")
    with pytest.raises(InputError, match="but gptq stores one of"):
        allocated(build_method("gptq", {}), allocate(table, bits=20.0))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_the_fields_of_an_allocation(name: str) -> None:
    kind: type[Method] = METHODS[name]
    assert {"overrides", "activation_overrides", "skip"} <= set(kind.model_fields)


def test_an_allocation_survives_its_file(table: ScoreTable, tmp_path: Path) -> None:
    bits = allocate(table, bits=7.0)
    write_allocation(bits, tmp_path / "bits.yaml")
    assert read_allocation(tmp_path / "bits.yaml") == bits
    with pytest.raises(PathError, match="does not exist"):
        read_allocation(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        read_allocation(tmp_path / "bad.yaml")


def test_budgets_come_in_bits_bytes_and_other_resources(table: ScoreTable) -> None:
    assert allocate(table, bits=7.0).bits <= 7.0
    whole = allocate(table, size=1500.0)
    assert whole.size_bytes <= 1500
    both = allocate(table, bits=9.0, limits={"bops": 400_000.0})
    assert both.achieved["bops"] <= 400_000
    assert both.achieved["size"] <= 9.0 * table.parameters
    with pytest.raises(InputError, match="needs a budget"):
        allocate(table)
    with pytest.raises(InputError, match="no cost 'watts'"):
        allocate(table, limits={"watts": 1.0})


def test_a_larger_budget_never_scores_worse(table: ScoreTable) -> None:
    found: list[Allocation] = [allocate(table, bits=bits) for bits in (6.5, 7.0, 8.0, 9.0, 10.0)]
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True)
    assert all(one.status == "optimal" for one in found)


def test_allocators_are_named_pairs_of_a_sensitivity_and_a_solver() -> None:
    assert allocator_named("hawq-v2+probes=3").sensitivity == "hawq-v2+probes=3"
    assert allocator_named("zeroq").solver == "dp"
    with pytest.raises(InputError, match="did you mean 'hawq-v2'"):
        allocator_named("hawq")


def test_the_published_order_by_trace_is_met(network: Any) -> None:
    how: dict[str, Any] = {"options": OPTIONS, "by": "hawq-v2-monotone+probes=4"}
    found = allocate(network.model, [network.batch(4)], bits=7.0, **how)
    table = measure(network.model, "hawq-v2+probes=4", [network.batch(4)], options=OPTIONS)
    assert table.priority is not None
    order = sorted(range(len(table.units)), key=lambda row: -float(table.priority[row]))  # type: ignore[index]
    bits = [found.units[table.units[row].name].weights.bits for row in order]  # type: ignore[union-attr]
    assert bits == sorted(bits, reverse=True)
    assert found.score >= allocate(table, bits=7.0).score
    assert "hawq-v2-monotone" in ALLOCATORS
