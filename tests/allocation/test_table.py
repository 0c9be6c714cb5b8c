"""Tables and allocations as data, and what they say of budgets."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from dither.allocation.allocation import Allocation
from dither.allocation.solve import solve
from dither.allocation.table import Fixed, Option, ScoreTable, Unit
from dither.errors import InputError, ShapeError
from dither.formats.spec import QuantSpec
from dither.report.allocation import allocation_rows


@pytest.fixture(name="table")
def a_table() -> ScoreTable:
    options = tuple(Option.parse(text) for text in ("int2:g64", "int4:g64:asym", "none"))
    units = (Unit("a.qkv", ("a.q", "a.k", "a.v"), 300), Unit("a.o", ("a.o",), 100))
    return ScoreTable(
        units,
        options,
        scores=np.array([[5.0, 1.0, 0.0], [9.0, np.inf, 0.0]]),
        costs={"size": np.array([[675.0, 1300.0, 4800.0], [225.0, np.inf, 1600.0]])},
        fixed=(Fixed("head", 8000, "kept"),),
        priority=np.array([0.25, 4.0]),
        errors=np.array([[0.5, 0.1, 0.0], [1.0, np.nan, 0.0]]),
        pairs={0: np.array([[0.0, 0.5], [0.5, 0.0]])},
        facts={"model": "abc"},
    )


def test_a_table_survives_json(table: ScoreTable) -> None:
    again = ScoreTable.from_data(json.loads(json.dumps(table.to_data(), allow_nan=False)))
    assert again.to_data() == table.to_data()
    assert again.options == table.options
    np.testing.assert_array_equal(again.scores, table.scores)
    np.testing.assert_array_equal(again.errors, table.errors)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.pairs[0], table.pairs[0])


def test_an_option_means_the_same_in_a_file_whatever_a_method_defaults_to() -> None:
    option = Option.parse("int4:g64/int8:token", QuantSpec.parse("int4:channel:asym:percentile"))
    again = Option.from_data(json.loads(json.dumps(option.to_data())))
    assert again == option
    assert str(option) == "int4:g64:asym:percentile/int8:token"


def test_a_table_with_a_unit_too_few_is_refused(table: ScoreTable) -> None:
    with pytest.raises(ShapeError, match="1 units and 3 options has scores of"):
        replace(table, units=table.units[:1])


def test_a_score_that_is_no_number_is_refused_by_name(table: ScoreTable) -> None:
    scores = table.scores.copy()
    scores[1, 2] = np.nan
    with pytest.raises(InputError, match=r"score of a.o as none is not a number"):
        replace(table, scores=scores)


def test_budgets_in_bits_and_bytes_count_what_is_fixed(table: ScoreTable) -> None:
    assert table.size_for_bits(4.25) == 4.25 * 400
    assert table.size_for_bytes(1500.0) == 8 * 1500 - 8000
    with pytest.raises(InputError, match="take 1000, such as head"):
        table.size_for_bytes(900.0)


def test_an_allocation_says_what_was_asked_for_and_what_came_of_it(table: ScoreTable) -> None:
    found = solve(table, {"size": table.size_for_bits(4.0)})
    assert {name: str(option) for name, option in found.units.items()} == {
        "a.qkv": "int4:g64:asym", "a.o": "int2:g64",
    }  # fmt: skip
    assert found.achieved["size"] == 1525
    assert found.requested["size"] == 1600
    assert found.bits == 1525 / 400
    assert found.size_bytes == (1525 + 8000) / 8
    assert found.fixed_share == 8000 / 9525
    assert found.status == "optimal"
    assert set(found.overrides()) == set(table.layers)
    again = Allocation.from_data(yaml.safe_load(yaml.safe_dump(found.to_data())))
    assert again == found


def test_a_layer_in_full_precision_is_skipped_not_overridden(table: ScoreTable) -> None:
    found = solve(table, {"size": table.size_for_bits(8.0)})
    assert found.kept() == ["a.o"]
    assert set(found.overrides()) == {"a.q", "a.k", "a.v"}


def test_an_impossible_budget_says_what_is_possible_in_bits_a_weight(table: ScoreTable) -> None:
    with pytest.raises(InputError, match=r"1\.5 bits a weight asked for, 2\.25 to 16 possible.* take 1000 bytes, 56%"):
        solve(table, {"size": table.size_for_bits(1.5)})


def test_an_impossible_budget_says_what_is_possible_in_bytes_of_the_model(table: ScoreTable) -> None:
    least, most = (f"{(bits + 8000) / 8:,.0f}" for bits in (675 + 225, 4800 + 1600))
    with pytest.raises(InputError, match=f"a size of 1,050 bytes cannot be met: the model takes {least} to {most} "):
        solve(table, {"size": table.size_for_bytes(1050.0)})


def test_an_unknown_cost_names_the_nearest(table: ScoreTable) -> None:
    with pytest.raises(InputError, match="did you mean 'size'"):
        solve(table, {"sise": 1e6})


def test_what_rounding_leaves_is_no_gap(table: ScoreTable) -> None:
    found = solve(table, {"size": table.size_for_bits(8.0)})
    gaps = [allocation_rows([replace(found, gap=gap)])[0]["Gap"] for gap in (1e-16, -1e-16, 0.0123, None)]
    assert gaps == ["0 %", "0 %", "1.2 %", "unknown"]


def test_a_file_that_is_no_allocation_is_refused() -> None:
    with pytest.raises(InputError, match="expected a file that `dither allocate` wrote"):
        Allocation.from_data({"kind": "recipe"}, "bits.yaml")
    with pytest.raises(InputError, match="is damaged: KeyError"):
        Allocation.from_data({"kind": "allocation", "schema": 1}, "bits.yaml")
