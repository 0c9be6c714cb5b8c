"""`dither study grid`: weights, activations and both in one table, whose rows outlive a kill."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Run, error_line
from tests.export.conftest import save_language_model

from dither import grid_study
from dither.comparison import Bench

WORDS = ("the cat", "an inn", "on the hill", "a dog ran", "in a barn")
FORMATS = ("--weights", "int8:channel:sym,int2:g16", "--activations", "none,int8:token:sym,int2:tensor:sym")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = save_language_model(tmp_path / "llama")
    for name, shift in (("calibration", 0), ("test", 3)):
        lines = [" ".join(WORDS[(i * i + j + shift) % 5] for j in range(3)) for i in range(60)]
        Path(f"{name}.txt").write_text("\n".join(lines))
    return folder


def study(run: Run, llama: Path, *options: object) -> object:
    return run(
        "study", "grid", llama, "--calibration", "calibration.txt", "--data", "test.txt", *FORMATS, "--samples", 3,
        "--length", 12, "--count", 2, *options,
    )  # fmt: skip


def test_weights_activations_and_both_stand_in_one_table(run: Run, llama: Path) -> None:
    done = study(run, llama, "--json", "-o", "grid")
    assert done.code == 0, done.err  # type: ignore[attr-defined]
    found = {row["label"]: row for row in done.data["runs"]}  # type: ignore[attr-defined]
    assert len(found) == 2 + 2 * 2 * 3
    full = done.data["reference"]["perplexity"]  # type: ignore[attr-defined]
    assert found["none / int8:token:sym"]["bits_per_weight"] == 32
    assert found["none / int8:token:sym"]["weights"] == "none"
    near, far = (abs(found[f"none / {form}"]["kl"]) for form in ("int8:token:sym", "int2:tensor:sym"))
    assert near < far
    both, alone = found["rtn int8:channel:sym / int8:token:sym"], found["rtn int8:channel:sym / none"]
    assert both["perplexity"] != alone["perplexity"]
    assert alone["perplexity"] == pytest.approx(full, rel=0.05)
    page = Path("grid/report.md").read_text()
    assert page.count("\n| ") == 1 + 1 + 2 * 2
    assert f"| – | full precision | – | {full:.2f} |" in page
    assert "src=" not in Path("grid/report.html").read_text()


def test_a_study_goes_on_with_the_rows_that_are_there(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study(run, llama, "--json")
    assert study(run, llama, "-o", "grid").code == 0  # type: ignore[attr-defined]
    rows = Path("grid/rows.jsonl").read_text().splitlines(keepends=True)
    Path("grid/rows.jsonl").write_text("".join(rows[:6]))  # a header and five rows
    for name in ("report.html", "report.json"):
        Path("grid", name).unlink()
    assert "--resume" in error_line(study(run, llama, "-o", "grid"))  # type: ignore[arg-type]
    asked: list[str] = []
    make = grid_study.run_jobs

    def counting(bench: Bench, *args: object, **options: object) -> object:
        known = options["known"]
        add = known.add  # type: ignore[attr-defined]
        known.add = lambda row: (asked.append(row["label"]), add(row))  # type: ignore[attr-defined]
        return make(bench, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(grid_study, "run_jobs", counting)
    done = study(run, llama, "-o", "grid", "--resume", "--json")
    assert done.code == 0, done.err  # type: ignore[attr-defined]
    assert len(asked) == 14 - 5
    figures = [[(row["label"], row["perplexity"]) for row in one.data["runs"]] for one in (whole, done)]  # type: ignore[attr-defined]
    assert figures[0] == figures[1]
    for name in ("report.html", "report.json"):
        Path("grid", name).unlink()
    Path("test.txt").write_text(Path("test.txt").read_text().replace("a dog ran", "a cat ran"))
    assert "had another data;" in error_line(study(run, llama, "-o", "grid", "--resume"))  # type: ignore[arg-type]
    other = ("study", "grid", llama, "--calibration", "calibration.txt", "--data", "test.txt", "-o", "grid", "--resume")
    assert "had another" in error_line(run(*other))
    assert json.loads(Path("grid/rows.jsonl").read_text().splitlines()[0])["kind"] == "grid"
