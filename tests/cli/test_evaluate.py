"""`dither evaluate`: what it measures with and without labels and reference."""

import json
import shutil
from pathlib import Path

from tests.cli.conftest import Run, error_line


def test_the_model_it_was_made_from_is_the_reference(run: Run, quantized: Path, pictures: Path) -> None:
    done = run("evaluate", quantized, "--data", pictures, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    assert done.data["count"] == 10
    assert done.data["reference"].endswith("tiny_vit")
    assert done.data["sqnr_db"] is not None


def test_people_get_a_table(run: Run, quantized: Path, pictures: Path) -> None:
    done = run("evaluate", quantized, "--data", pictures, "--count", 4)
    assert done.code == 0
    for text in ("Top-1", "Agreement", "SQNR", "on 4 inputs"):
        assert text in done.out
    assert done.err == ""


def test_without_its_source_it_says_what_fidelity_needs(
    run: Run, quantized: Path, pictures: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(quantized, tmp_path / "moved")
    report = json.loads((moved / "report.json").read_text())
    report["model"]["source"] = "gone"
    (moved / "report.json").write_text(json.dumps(report))
    done = run("evaluate", moved, "--data", pictures)
    assert done.code == 0
    assert done.err == "agreement, KL and SQNR need the full-precision model: add --reference MODEL\n"
    assert "Top-1" in done.out
    assert "Agreement" not in done.out
    assert run("evaluate", moved, "--data", pictures, "--quiet").err == ""


def test_a_model_compared_with_itself_agrees(run: Run, tiny_model: Path, pictures: Path) -> None:
    found = run("evaluate", tiny_model, "--data", pictures, "--reference", tiny_model, "--json").data
    assert (found["agreement"], found["kl"], found["sqnr_db"]) == (1.0, 0.0, None)


def test_the_seed_decides_which_pictures_are_drawn(run: Run, quantized: Path, pictures: Path) -> None:
    arguments = ("evaluate", quantized, "--data", pictures, "--count", 5, "--json", "--seed")
    first, again, other = (run(*arguments, seed).data["kl"] for seed in (1, 1, 2))
    assert first == again != other


def test_pictures_without_labels_need_a_reference(run: Run, tiny_model: Path, pictures: Path) -> None:
    done = run("evaluate", tiny_model, "--data", pictures / "cat", "--quiet")
    assert "no labels" in error_line(done)
    assert run("evaluate", tiny_model, "--data", pictures / "cat", "--reference", tiny_model).code == 0


def test_labels_that_are_no_classes_of_the_model_are_named(
    run: Run, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures / "cat", tmp_path / "birds" / "heron")
    done = run("evaluate", tiny_model, "--data", "birds", "--reference", tiny_model)
    assert "'heron'" in error_line(done)
