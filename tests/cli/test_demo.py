"""`dither demo`: the main job with what comes with the package."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Run, error_line


@pytest.mark.slow
def test_the_demo_shows_that_erq_beats_rounding_and_leaves_a_report_and_a_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither import comparison

    exam, quantize = comparison.open_exam, comparison.quantize  # fewer pictures than the demo takes, to save time
    monkeypatch.setattr(comparison, "open_exam", lambda network, data, *_: exam(network, data, 100))
    monkeypatch.setattr(comparison, "quantize", lambda *given, **named: quantize(*given, **{**named, "count": 8}))
    done = run("demo")
    assert done.code == 0, done.err
    folder = tmp_path / "dither-demo"
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json", "vit-erq"}
    runs = {row["method"]: row for row in json.loads((folder / "report.json").read_text())["runs"]}
    assert runs["erq"]["agreement"] > runs["rtn"]["agreement"]
    assert runs["erq"]["bits_per_weight"] < 3.3
    assert "report: dither-demo/report.html" in done.out
    assert "quantized by erq" in run("inspect", folder / "vit-erq").out


def test_an_earlier_result_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "report.html").write_text("mine")
    assert "report.html already" in error_line(run("demo", "-o", "here"))


def test_the_default_folder_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dither.cli.demo import _unused

    monkeypatch.chdir(tmp_path)
    assert _unused() == Path("dither-demo")
    Path("dither-demo").mkdir()
    assert _unused() == Path("dither-demo-2")
