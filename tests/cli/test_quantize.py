"""`dither quantize`: what it writes, plans and prints when all is well."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Run, error_line

FORMATS = ("--weights", "int4", "--activations", "int4")


def test_the_result_is_saved_and_a_table_says_how_large_it_is(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    done = run("quantize", tiny_model, "--calibration", calibration, *FORMATS, "-o", "out")
    assert done.code == 0, done.err
    assert "Bits per weight" in done.out
    assert "saved in out" in done.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "recipe.yaml", "provenance.json", "report.json", "report.html"}
    assert "unfinished" not in names


def test_json_is_the_report_and_nothing_else(run: Run, tiny_model: Path, calibration: Path, tmp_path: Path) -> None:
    done = run("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "-o", "out", "--json")
    assert done.code == 0
    assert done.err == ""
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert done.data == {**saved, "output": "out"}


def test_evaluating_afterwards_puts_the_figures_into_the_saved_report(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    arguments = ("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", *FORMATS, "-o", "out")
    done = run(*arguments, "--evaluate", pictures, "--count", 6)
    assert done.code == 0, done.err
    assert "on 6 inputs" in done.out
    evaluation = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    assert evaluation["count"] == 6
    assert 0 <= evaluation["agreement"] <= 1
    assert "Agreement" in (tmp_path / "out" / "report.html").read_text()


def test_an_evaluation_that_fails_leaves_the_result_and_says_where_it_is(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.errors import NonFiniteError
    from dither.evaluation.exam import PictureExam

    def fail(self: PictureExam, *_: object) -> None:
        raise NonFiniteError("NaN in the logits")

    monkeypatch.setattr(PictureExam, "mark", fail)
    arguments = ("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "-o", "out")
    assert "saved in 'out'" in error_line(run(*arguments, "--evaluate", pictures))
    assert run("inspect", "out").code == 0
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    arguments = ("quantize", tiny_model, "--calibration", calibration, *FORMATS, "--skip", "classifier", "--dry-run")
    done = run(*arguments, "-o", "out")
    assert done.code == 0, done.err
    for text in ("vit.layers.1.mlp.fc2", "skipped by 'classifier'", "Memory", "Time", "nothing was written"):
        assert text in done.out
    plan = run(*arguments, "--json").data
    assert plan["units"] == 3  # patches and two blocks
    assert plan["size_bytes"] < plan["original_bytes"] / 3
    assert plan["memory_bytes"] > plan["original_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_knows_the_exact_sizes(run: Run, tiny_model: Path, calibration: Path) -> None:
    arguments = ("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", *FORMATS, "--json")
    plan, report = run(*arguments, "--dry-run").data, run(*arguments, "-o", "out").data
    assert [row["nbytes"] for row in plan["layers"]] == [row["nbytes"] for row in report["layers"]]


def test_fields_skips_and_overrides_reach_the_recipe(run: Run, tiny_model: Path, calibration: Path) -> None:
    done = run(
        "quantize", tiny_model, "--calibration", calibration, "-m", "gptq", "-o", "out", "--json",
        "--set", "damping=0.05", "--set", "act_order=false", "--skip", "classifier", "--skip", "*.fc1",
        "--override", "*.fc2=int8",
    )  # fmt: skip
    assert done.code == 0, done.err
    recipe = done.data["recipe"]
    assert (recipe["damping"], recipe["act_order"], recipe["skip"]) == (0.05, False, ["classifier", "*.fc1"])
    formats = {row["name"]: row["weights"] for row in done.data["layers"]}
    assert "classifier" not in formats
    assert formats["vit.layers.0.mlp.fc2"].startswith("int8")
    reasons = {row["name"]: row["reason"] for row in done.data["coverage"]}
    assert reasons["vit.layers.0.mlp.fc1"] == "skipped by '*.fc1'"


def test_a_saved_recipe_makes_the_same_file_again(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    assert run("quantize", tiny_model, "--calibration", calibration, *FORMATS, "-o", "one").code == 0
    done = run("quantize", tiny_model, "--calibration", calibration, "--recipe", "one/recipe.yaml", "-o", "two")
    assert done.code == 0, done.err
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second


def test_options_win_over_a_recipe(run: Run, tiny_model: Path, calibration: Path, tmp_path: Path) -> None:
    recipe = {"schema": 1, "method": "rtn", "weights": "int3", "activations": None, "skip": ["*.fc1"]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    arguments = ("quantize", tiny_model, "--calibration", calibration, "--recipe", "r.yaml", "--dry-run", "--json")
    plan = run(*arguments, "--weights", "int5", "--skip", "classifier").data
    assert {row["weights"].partition(":")[0] for row in plan["layers"]} == {"int5"}
    assert set(plan["kept"]) == {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1", "classifier"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--calibration", "c"),  # no output
        ("-o", "out"),  # no calibration
        ("--calibration", "c", "-o", "out", "-m", "rtn", "--recipe", "r.yaml"),
        ("--calibration", "c", "-o", "out", "--set", "damping"),
        ("--calibration", "c", "-o", "out", "--override", "classifier"),
        ("--calibration", "c", "-o", "out", "--samples", "0"),
        ("--calibration", "c", "-o", "out", "--weight", "int4"),
    ],
)
def test_a_command_line_that_is_wrong_exits_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    done = run("quantize", "model", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Error" in done.err
