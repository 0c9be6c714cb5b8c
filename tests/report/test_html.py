import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dither.errors import InputError, StorageError
from dither.report.html import render_html, write_html

Data = Callable[..., dict[str, Any]]
LOADS = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
VOID = {"meta", "input", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in LOADS]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in LOADS]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page(data: dict[str, Any]) -> Page:
    parsed = Page(render_html(data))
    assert parsed.open == []
    return parsed


@pytest.mark.parametrize("kind", ["quantize", "compare"])
def test_a_report_loads_nothing_from_outside_itself(kind: str, quantize_data: Data, compare_data: Data) -> None:
    text = render_html(quantize_data(2) if kind == "quantize" else compare_data(seeds=2, blocks=1))
    assert all(load.startswith("#") for load in Page(text).loads)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert not re.search(r"@import|url\((?!#)", text)


@pytest.mark.parametrize("kind", ["quantize", "compare"])
def test_two_renders_of_equal_data_are_equal(kind: str, quantize_data: Data, compare_data: Data) -> None:
    make = quantize_data if kind == "quantize" else compare_data
    assert render_html(make(blocks=1)) == render_html(make(blocks=1))


def test_every_section_has_its_place(quantize_data: Data, compare_data: Data) -> None:
    assert page(quantize_data(2)).headings == [
        "Layers",
        "Attention operands",
        "Stored bytes",
        "Layer by layer",
        "Coverage",
        "Settings",
    ]
    assert page(compare_data(seeds=2, blocks=1)).headings == [
        "Failures",
        "Results",
        "Quality and time",
        "Quality against bits",
        "Error per layer",
        "Settings",
    ]


@pytest.mark.parametrize("kind", ["quantize", "compare"])
def test_sections_without_data_are_left_out(kind: str) -> None:
    assert page({"schema": 1, "kind": kind}).headings == []


def test_a_convolutional_network_without_activations_shows_no_operands(quantize_data: Data) -> None:
    data = {**quantize_data(1), "operands": [], "evaluation": None}
    for layer in data["layers"]:
        layer.update(activations=None, input_range=None, clip_range=None)
    text = render_html(data)
    assert "Attention operands" not in text
    assert "Agreement" not in text
    assert "Ranges:" not in text


def test_markup_in_any_text_is_shown_and_never_run(quantize_data: Data, compare_data: Data) -> None:
    evil = "<script>alert(1)</script>\"'&"
    data = quantize_data(1)
    data["model"].update(name=evil, source=evil, **{"class": evil})
    data["recipe"][evil] = evil
    data["provenance"][evil] = {evil: evil}
    data["layers"][0].update(name=evil, kind=evil, weights=evil, notes={evil: evil}, output_error=9.0)
    data["operands"][0].update(name=evil, operand=evil)
    data["coverage"][0].update(name=evil, status=evil, reason=evil)
    other = compare_data(seeds=1, blocks=1)
    other["runs"][0].update(label=evil, weights=evil, layers=[{"name": evil, "output_error": 1.0}])
    other["failures"] = [{"method": evil, "seed": 0, "error": evil, evil: evil}]
    for report in (data, other):
        text = render_html(report)
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)" in text
        assert text.count("<script>") == 1


def test_unknown_numbers_are_dashes_and_never_words(quantize_data: Data, compare_data: Data) -> None:
    data, other = quantize_data(1), compare_data(seeds=2, blocks=1)
    data["layers"][1].update(output_error=math.nan, bits_per_weight=None, input_range=[math.nan, 1.0], notes=None)
    data["totals"].update(size_bytes=math.inf, time_s=None)
    data["evaluation"].update(top1=None, fp_top1=None, kl=math.nan)
    other["runs"][0].update(top1=math.nan, kl=None, time_s=math.inf)
    for report in (data, other):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", render_html(report))
        assert not [cell for cell in cells if re.search(r"\b(nan|inf|None|null)\b", cell)]
    assert '<td class="n">–</td>' in render_html(data)


def test_the_best_mean_is_bold_and_shows_its_deviation(compare_data: Data) -> None:
    data = compare_data(methods=("a", "b"), settings=(("int4", "int4"),), seeds=2, blocks=1)
    for run, top1 in zip(data["runs"], (0.80, 0.82, 0.70, 0.70), strict=True):
        run["top1"] = top1
    text = render_html(data)
    assert "<b>81.0 ± 1.4%</b>" in text
    assert "70.0 ± 0.0%" in text
    assert "<b>70.0" not in text


def test_two_hundred_layers_render(quantize_data: Data) -> None:
    data = quantize_data(33)
    text = render_html(data)
    assert len(data["layers"]) == 200
    assert all(f"<code>{layer['name']}</code>" in text for layer in data["layers"])


def test_a_report_is_written_whole_and_leaves_no_temporary_file(tmp_path: Path, quantize_data: Data) -> None:
    target = tmp_path / "new" / "report.html"
    assert write_html(quantize_data(1), target) == target
    first = target.read_text(encoding="utf-8")
    assert first == render_html(quantize_data(1))
    write_html(quantize_data(2), str(target))
    assert target.read_text(encoding="utf-8") != first
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_an_unwritable_path_is_a_storage_error_that_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize_data: Data
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(StorageError, match=r"report\.html"):
        write_html(quantize_data(1), target / "below.html")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="no space left"):
        write_html(quantize_data(1), target)
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_data_of_another_schema_is_refused() -> None:
    with pytest.raises(InputError, match="schema"):
        render_html({"schema": 7, "kind": "quantize"})
