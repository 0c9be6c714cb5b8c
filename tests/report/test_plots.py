import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import pytest

from dither.report import canvas, comparison, plots

Data = Callable[..., dict[str, Any]]
QUANTIZE = (plots.layers_plot, plots.operands_plot, plots.size_plot)
COMPARE = (comparison.methods_plot, comparison.tradeoff_plot, comparison.layer_lines_plot)


@pytest.mark.parametrize("plot", QUANTIZE)
def test_a_plot_of_a_model_is_valid_and_described(plot: Callable[..., str | None], quantize_data: Data) -> None:
    root = ElementTree.fromstring(plot(quantize_data(2)) or "")
    assert root.get("role") == "img"
    assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"]


@pytest.mark.parametrize("plot", COMPARE)
def test_a_plot_of_a_comparison_is_valid_and_described(plot: Callable[..., str | None], compare_data: Data) -> None:
    root = ElementTree.fromstring(plot(compare_data(seeds=2, blocks=1)) or "")
    assert root.get("role") == "img"
    assert root[1].text


@pytest.mark.parametrize("plot", [*QUANTIZE, *COMPARE])
def test_a_plot_without_data_is_none(plot: Callable[..., str | None]) -> None:
    assert plot({"schema": 1, "kind": "quantize"}) is None


def test_a_plot_leaves_the_settings_of_matplotlib_alone(quantize_data: Data) -> None:
    before = {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}  # reading it would choose one
    plots.size_plot(quantize_data(1))
    assert {name: mpl.rcParams[name] for name in before} == before


def test_a_plot_does_not_depend_on_the_settings_of_matplotlib(quantize_data: Data) -> None:
    plain = plots.operands_plot(quantize_data(2))
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert plots.operands_plot(quantize_data(2)) == plain


def test_ids_of_different_plots_on_one_page_differ(quantize_data: Data) -> None:
    data = quantize_data(2)
    found = [set(re.findall(r' id="([^"]+)"', plot(data) or "")) for plot in QUANTIZE]
    assert not found[0] & found[1]
    assert not found[1] & found[2]


def test_unmeasured_and_zero_errors_are_drawn_as_such(quantize_data: Data) -> None:
    data = quantize_data(1)
    data["layers"][0]["output_error"] = None
    data["layers"][1]["output_error"] = math.nan
    data["layers"][2]["output_error"] = 0.0
    drawn = plots.layers_plot(data) or ""
    assert drawn.count(">–</text>") == 2
    assert drawn.count(">0</text>") >= 1


def test_a_plot_without_any_error_still_shows_the_ranges(quantize_data: Data) -> None:
    data = quantize_data(1)
    for layer in data["layers"]:
        layer["output_error"] = None
    drawn = plots.layers_plot(data) or ""
    assert "observed input" in drawn
    assert "relative output error" not in drawn


def test_one_huge_range_turns_the_axis_logarithmic(quantize_data: Data) -> None:
    data = quantize_data(1)
    assert "then log" not in (plots.layers_plot(data) or "")
    data["layers"][0]["input_range"] = [-3000.0, 20.0]
    assert "then log" in (plots.layers_plot(data) or "")


def test_three_hundred_layers_are_labelled_by_block(quantize_data: Data) -> None:
    drawn = plots.layers_plot(quantize_data(50)) or ""
    assert ">layers.49</text>" in drawn
    assert "layers.49.mlp.fc2" not in drawn.replace("</desc>", "").partition("</title>")[2].partition("<g>")[2]


def test_names_that_hold_markup_or_dollars_are_only_text(quantize_data: Data) -> None:
    data = quantize_data(1)
    data["layers"][0]["name"] = "a$x_{<b>&$"
    data["layers"][0]["output_error"] = 9.0
    drawn = plots.layers_plot(data) or ""
    ElementTree.fromstring(drawn)
    assert "a$x_{&lt;b&gt;&amp;$" in drawn


def test_names_in_another_script_need_no_font_of_matplotlib(compare_data: Data) -> None:
    assert "量化" in (comparison.methods_plot(compare_data(methods=("量化", "rtn"), seeds=1, blocks=1)) or "")


def test_bits_are_compared_only_where_they_differ(compare_data: Data) -> None:
    assert comparison.tradeoff_plot(compare_data(methods=("rtn", "erq"), settings=(("int4", "int8"),))) is None


def test_the_full_precision_line_is_drawn_only_when_known(compare_data: Data) -> None:
    assert "full precision 87.9" in (comparison.methods_plot(compare_data(seeds=1)) or "")
    without = comparison.methods_plot(compare_data(seeds=1, top1=False)) or ""
    assert "full precision 87.9" not in without
    assert "agreement" in without


def test_short_names_drop_the_shared_prefix_and_keep_the_end() -> None:
    assert canvas.short_names(["m.layers.0.a.q", "m.layers.1.a.q"]) == ["0.a.q", "1.a.q"]
    (short,) = canvas.short_names(["model.vision_tower.encoder.layers.10.self_attention.q_proj"])
    assert short.startswith("…")
    assert short.endswith("layers.10.self_attention.q_proj")
    assert len(canvas.short_names(["x" * 90])[0]) <= canvas.TEXT_LIMIT


def test_rare_roles_share_a_colour_and_one_role_everywhere_yields_to_its_parent() -> None:
    _, legend = canvas.role_colours([f"block.0.role{i}" for i in range(12)])
    assert len(legend) == len(canvas.PALETTE)
    assert "other" in legend
    _, legend = canvas.role_colours(["0.expand.convolution", "0.reduce.convolution", "1.expand.convolution"])
    assert set(legend) == {"expand", "reduce"}
