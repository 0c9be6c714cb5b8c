"""The report of a search says what was tried, what won, and what each choice did."""

from typing import Any

import pytest
from tests.report.test_html import Page

from dither.report.html import render_html
from dither.report.tune import _running, effect_rows, pareto, summary, trial_rows


def trial(number: int, method: str, top1: float | None, size: float, **more: Any) -> dict[str, Any]:
    figures = {} if top1 is None else {"top1": top1, "kl": 1 - top1, "perplexity": None, "size_bytes": size}
    configuration = {"method": method, "ends": "kept" if number % 2 else "quantized", "samples": 8}
    cost = None if top1 is None else 0.9 - top1
    facts = {"number": number, "configuration": configuration, "figures": figures, "error": None, "time_s": 1.5}
    return {**facts, "cost": cost, "violation": 0.0} | more


@pytest.fixture
def data() -> dict[str, Any]:
    trials = [
        trial(0, "rtn", 0.7, 2e6), trial(1, "gptq", 0.8, 2.5e6), trial(2, "gptq", 0.85, 9e6, violation=0.8),
        trial(3, "rtn<b>", None, 0.0, error="out of & memory"),
    ]  # fmt: skip
    return {
        "schema": 1, "kind": "tune", "model": {"name": "vit", "class": "ViT", "parameters": 10}, "provenance": {},
        "settings": {"objective": "accuracy", "limits": [{"name": "size", "bound": 5e6}], "strategy": "genetic"},
        "reference": {"top1": 0.9, "size_bytes": 8e6}, "trials": trials, "notes": ["one set was split"],
        "best": {**trials[1], "test": {"top1": 0.78, "source": "final"}, "folder": "out/best", "command": None},
    }  # fmt: skip


def test_the_page_is_whole_escapes_what_it_is_given_and_loads_nothing(data: dict[str, Any]) -> None:
    text = render_html(data)
    page = Page(text)
    assert page.open == []
    assert all(load.startswith("#") for load in page.loads)
    assert "rtn<b>" not in text
    assert "out of &amp; memory" in text
    assert {"Over time", "Quality against size", "Trials", "What each choice did", "Notes"} <= set(page.headings)
    assert "at most 5.00 MB" in text
    assert render_html(data) == text


def test_trials_that_keep_the_limits_come_first_and_failures_last(data: dict[str, Any]) -> None:
    rows = trial_rows(data, ranked=True)
    assert [row["Trial"] for row in rows] == ["1", "0", "2", "3"]
    assert rows[2]["Remark"] == "80.0% over the limits"
    assert rows[3]["Remark"] == "failed: out of & memory"
    assert "Samples" not in rows[0]  # all had the same
    assert [row["Trial"] for row in trial_rows(data, ranked=False)] == ["0", "1", "2", "3"]


def test_the_summary_tells_the_judged_figure_from_the_tested_one(data: dict[str, Any]) -> None:
    values = {row["figure"]: row["value"] for row in summary(data)}
    assert (values["Best"], values["Accuracy"], values["Test accuracy"], values["Trials"]) == (
        "gptq",
        "80.0%",
        "78.0%",
        "4",
    )
    data["best"] = None
    assert [row["figure"] for row in summary(data)] == ["Trials"]
    assert "Over time" in Page(render_html(data)).headings


def test_the_effect_of_a_choice_is_the_mean_of_its_trials(data: dict[str, Any]) -> None:
    (row,) = [row for row in effect_rows(data) if row["Value"] == "gptq"]
    assert (row["Trials"], row["Mean"], row["Best"]) == ("2", "82.5%", "85.0%")


def test_the_front_holds_what_no_other_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (4.0, 0.9)]
    assert pareto(points, up=True) == [(1.0, 0.5), (2.0, 0.7), (4.0, 0.9)]
    assert pareto([(x, -y) for x, y in points], up=False) == [(1.0, -0.5), (2.0, -0.7), (4.0, -0.9)]


def test_the_best_so_far_never_falls_and_counts_only_what_kept_the_limits() -> None:
    points = [(0, 0.9, False), (1, 0.5, True), (2, 0.4, True), (3, 0.6, True)]
    assert _running(points, up=True) == [(1, 0.5), (2, 0.5), (3, 0.6)]
