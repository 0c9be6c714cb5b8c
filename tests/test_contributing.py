"""The page for contributors keeps its word: its method runs as it stands, unregistered and registered."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
from dither.recipe import from_data, resolved
from dither.storage import write_network

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The method of the page, in a file of its own."""
    section = PAGE.split("## Add a method in one file")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    file = tmp_path_factory.mktemp("page") / "corrected.py"
    file.write_text(code[1])
    spec = importlib.util.spec_from_file_location("corrected", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Corrected


def test_the_method_of_the_page_works_without_being_registered(
    skeleton: Any, odd: Callable[..., Any], tmp_path: Path
) -> None:
    network = odd(depth=1)
    method = skeleton(weights="int3", activations="int4")
    result = dither.quantize(network.model, method, network.batch(8))
    plain = dither.quantize(network.model, dither.RTN(weights="int3", activations="int4"), network.batch(8))
    rows = zip(result.report.data["layers"], plain.report.data["layers"], strict=True)
    better = [mine["output_error"] < other["output_error"] for mine, other in rows if not mine["notes"]]
    assert better == [True] * 3  # the layers that have a bias
    write_network(result.network, tmp_path / "out")
    again = dither.load(tmp_path / "out", into=odd(seed=1, depth=1).model)
    assert torch.equal(network.logits(network.batch(3), again), network.logits(network.batch(3), result.model))
    assert resolved(method)["method"] == "corrected"


def test_the_method_of_the_page_can_be_registered_by_name(skeleton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dither.METHODS, "corrected", skeleton)
    method = skeleton(weights="int3", strength=0.5)
    assert from_data(resolved(method), "here") == method


@pytest.mark.slow
def test_the_method_of_the_page_is_compared_with_others(
    skeleton: Any, demo_model_folder: Path, demo_calibration_folder: Path, demo_test_folder: Path
) -> None:
    report = dither.compare(
        demo_model_folder, ["rtn+weights=int2", skeleton(weights="int2")], demo_calibration_folder, demo_test_folder,
        count=4, evaluate_count=20,
    )  # fmt: skip
    assert [row["method"] for row in report.data["runs"]] == ["rtn", "corrected"]
    assert not report.data["failures"]


def test_what_the_page_names_is_there() -> None:
    for path in re.findall(r"`((?:src|tests)/[\w/]+\.py|scripts/\w+)`", PAGE):
        assert (ROOT / path).exists() or path == "tests/methods/test_NAME.py", path
    for path in re.findall(r"^scripts/\w+", PAGE, re.MULTILINE):
        assert (ROOT / path).exists(), path
