import math
from collections.abc import Callable
from typing import Any

import pytest

from dither.report import table
from dither.report.data import Spread

Data = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True])
def test_what_is_unknown_is_a_dash(value: object) -> None:
    for text in (table.percent, table.size, table.seconds, table.count, table.fixed, table.significant):
        assert text(value) == table.DASH


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_156_000, "2.16 MB"), (999_600, "1.00 MB"), (3.2e9, "3.20 GB")],
)
def test_bytes_are_in_decimal_units(value: float, text: str) -> None:
    assert table.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "50 ms"), (0.5, "0.50 s"), (9.13, "9.1 s"), (125, "2 min 5 s"), (3_780, "1 h 3 min")],
)
def test_durations_read_as_a_person_says_them(value: float, text: str) -> None:
    assert table.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (4.1666, "4.17"), (123.4, "123"), (2e-7, "2.00e-07"), (32, "32.0")],
)
def test_significant_digits_are_kept(value: float, text: str) -> None:
    assert table.significant(value) == text


def test_a_spread_shows_its_deviation_only_when_there_is_one() -> None:
    assert table.spread_text(Spread(0.846, 0.004, 5), 1, 100.0, "%") == "84.6 ± 0.4%"
    assert table.spread_text(Spread(0.846, None, 1), 1, 100.0, "%") == "84.6%"
    assert table.spread_text(None) == table.DASH


def test_nested_settings_become_dotted_names() -> None:
    values = {"a": {"b": 1, "c": [True, None]}, "d": {}, "e": 0.1}
    assert table.flat(values) == [("a.b", "1"), ("a.c", "yes, –"), ("d", "–"), ("e", "0.1")]


def test_the_summary_states_change_ratio_and_what_each_figure_means(quantize_data: Data) -> None:
    rows = {row["figure"]: row for row in table.summary_rows(quantize_data())}
    assert rows["Top-1"]["value"] == "87.9% → 86.1%"
    assert rows["Top-1"]["note"] == "−1.8 points on 1,000 inputs"
    assert "× smaller" in rows["Size"]["note"]
    assert all(row["meaning"] for row in rows.values())


def test_unknown_figures_are_left_out_of_the_summary(quantize_data: Data) -> None:
    data = {**quantize_data(1), "evaluation": None, "totals": {"bits_per_weight": math.nan, "time_s": 2.0}}
    assert [row["figure"] for row in table.summary_rows(data)] == ["Time"]


def test_a_comparison_row_is_mean_and_deviation_over_seeds(compare_data: Data) -> None:
    data = compare_data(methods=("erq",), settings=(("int4", "int4"),), seeds=2)
    data["runs"][0].update(top1=0.80, kl=0.1)
    data["runs"][1].update(top1=0.82, kl=0.1)
    (row,) = table.compare_rows(data)
    assert row["Top-1"] == "81.0 ± 1.4%"
    assert row["KL"] == "0.100 ± 0.000"
    assert row["Seeds"] == "2"


def test_a_column_without_data_is_left_out(compare_data: Data, quantize_data: Data) -> None:
    assert "Top-1" not in table.compare_rows(compare_data(top1=False))[0]
    data = quantize_data(1)
    for layer in data["layers"]:
        layer.update(activations=None, notes={}, output_error=math.nan)
    assert set(table.layer_rows(data)[0]) == {"Layer", "Shape", "Weights", "Bits"}


def test_a_layer_row_tells_the_notes_of_its_solver(quantize_data: Data) -> None:
    row = table.layer_rows(quantize_data())[0]
    assert row["Shape"] == "192×3×4×4"
    assert row["Notes"] == "damping 0.03, tries 4"


def test_the_reasons_count_every_module_once(quantize_data: Data) -> None:
    data = quantize_data()
    reasons = table.coverage_reasons(data)
    assert sum(int(row["Modules"]) for row in reasons) == len(table.coverage_rows(data)) == len(data["coverage"])
    assert reasons[0]["Status"] == "quantized"
    norms = [{"name": f"n{i}", "status": "folded", "reason": f"folded into c{i}", "parameters": 2} for i in range(3)]
    folded = [row for row in table.coverage_reasons({**data, "coverage": norms}) if row["Status"] == "folded"]
    assert [row["Modules"] for row in folded] == ["3"]


def test_a_report_without_lists_gives_no_rows() -> None:
    empty = {"schema": 1, "kind": "compare"}
    assert table.compare_rows(empty) == table.layer_rows(empty) == table.coverage_rows(empty) == []
