import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dither.errors import InputError, PathError, StorageError
from dither.report.data import (
    best_cells,
    block,
    check_report,
    interval,
    method_summaries,
    number,
    quality_metric,
    read_report,
    role,
    setting,
    spread,
)

Data = Callable[..., dict[str, Any]]


def test_a_report_is_read_from_its_file_and_from_its_folder(tmp_path: Path, quantize_data: Data) -> None:
    data = quantize_data(1)
    (tmp_path / "report.json").write_text(json.dumps(data), encoding="utf-8")
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == data


def test_a_missing_report_is_a_path_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"nothing\.json"):
        read_report(tmp_path / "nothing.json")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00"], ids=["cut off", "not text"])
def test_a_damaged_report_is_a_storage_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(StorageError, match="expected JSON"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "JSON object"),
        ({"kind": "quantize"}, "schema 1, got None"),
        ({"schema": 2, "kind": "quantize"}, "schema 1, got 2"),
        ({"schema": 1, "kind": "quantise"}, "did you mean 'quantize'"),
        ({"schema": 1, "kind": ["quantize"]}, "kind"),
        ({"schema": 1, "kind": "quantize", "model": 3}, "'model' to be an object, got int"),
        ({"schema": 1, "kind": "quantize", "layers": {}}, "'layers' to be a list"),
        ({"schema": 1, "kind": "compare", "runs": [1]}, "'runs' to be a list"),
    ],
)
def test_data_that_is_no_report_is_refused_by_the_field_that_is_wrong(data: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_report(data)


def test_mean_and_sample_deviation_follow_their_definitions() -> None:
    found = spread([1.0, 2, 4.0, None, math.nan, "x", True])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3, rel=1e-12)
    assert found.std == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2), rel=1e-12)
    assert found.count == 3


def test_one_value_has_no_deviation_and_no_value_has_no_mean() -> None:
    one = spread([0.5])
    assert one is not None
    assert (one.mean, one.std, one.count) == (0.5, None, 1)
    assert spread([None, math.inf]) is None


def test_what_is_not_finite_is_no_number_and_no_interval() -> None:
    assert [number(value) for value in (1, 0.5, math.nan, -math.inf, None, "1", True)] == [1.0, 0.5] + [None] * 5
    assert interval([-1, 2]) == (-1.0, 2.0)
    assert interval([0, math.nan]) is interval([1]) is interval(None) is None


@pytest.mark.parametrize(
    ("name", "where", "what"),
    [
        ("vit.layers.3.attention.q_proj", "vit.layers.3", "q_proj"),
        ("resnet.stages.1.layers.0.layer.1.convolution", "resnet.stages.1", "convolution"),
        ("classifier", "", "classifier"),
        ("0", "0", "0"),
        ("layers.12", "layers.12", "layers"),
    ],
)
def test_block_and_role_are_read_from_a_name(name: str, where: str, what: str) -> None:
    assert (block(name), role(name)) == (where, what)


@pytest.mark.parametrize(
    ("weights", "activations", "short"),
    [
        ("int3:g128:asym", "int8:tensor", "W3 A8"),
        ("nf4:g64", "", "W4"),
        ("log2-4", "mxfp4", "W4 A4"),
        ("fp4_e2m1", "bf16", "Wfp4_e2m1 A16"),
        ("", "", ""),
    ],
)
def test_a_setting_is_the_bits_of_both_formats(weights: str, activations: str, short: str) -> None:
    assert setting(weights, activations) == short


def test_runs_are_joined_over_seeds_and_the_best_comes_first(compare_data: Data) -> None:
    data = compare_data(seeds=3)
    rows = method_summaries(data)
    assert [row.setting for row in rows] == ["W4 A4"] * 6 + ["W3 A4"] * 6 + ["W3 A8"] * 6
    assert rows[0].label == "erq"
    runs = [run["top1"] for run in data["runs"] if run["method"] == "erq" and run["weights"] == "int4"]
    assert rows[0].values["top1"] == tuple(runs)
    assert rows[0].runs == 3


def test_without_top1_methods_are_ranked_by_agreement(compare_data: Data) -> None:
    data = compare_data(top1=False)
    assert quality_metric(data) == "agreement"
    means = [cell.mean for row in method_summaries(data)[:6] if (cell := row.metrics["agreement"])]
    assert means == sorted(means, reverse=True)


def test_the_best_cell_is_the_highest_or_lowest_mean_of_its_setting(compare_data: Data) -> None:
    rows = method_summaries(compare_data())
    best = best_cells(rows)
    for metric, choose in (("top1", max), ("kl", min)):
        for first in (0, 6, 12):
            cells = {i: cell.mean for i in range(first, first + 6) if (cell := rows[i].metrics[metric])}
            assert (choose(cells, key=lambda i, cells=cells: cells[i]), metric) in best


def test_nothing_is_best_where_all_rows_look_equal(compare_data: Data) -> None:
    data = compare_data(methods=("a", "b"), seeds=1)
    for index, run in enumerate(data["runs"]):
        run.update(top1=0.5 + 1e-5 * index, agreement=0.5, kl=0.1, sqnr_db=10.0)
    assert best_cells(method_summaries(data)) == set()
