"""`dither compare`: one table, one report, and no run lost to another's failure."""

from pathlib import Path

import pytest
from tests.cli.conftest import Run, error_line
from tests.export.conftest import save_language_model


def test_every_method_format_and_seed_is_a_run(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    done = run(
        "compare", tiny_model, "--methods", "rtn,gptq+act_order=false", "--weights", "int4,int2", "--activations",
        "int4", "--seeds", 2, "--seed", 3, "--samples", 6, "--calibration", calibration, "--data", pictures, "--json",
        "-o", "report",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    runs = done.data["runs"]
    assert len(runs) == 8
    assert {row["seed"] for row in runs} == {3, 4}
    assert {row["label"] for row in runs} == {"rtn", "gptq+act_order=false"}
    assert done.data["provenance"]["seed"] == "3 to 4"
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.json"}
    shown = run("inspect", "report")
    assert "gptq+act_order=false" in shown.out


def test_people_get_a_table_with_the_full_precision_model_below(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path
) -> None:
    done = run("compare", tiny_model, "--methods", "rtn", "--calibration", calibration, "--data", pictures)
    assert done.code == 0
    assert "rtn" in done.out
    assert "full precision: top-1 " in done.out


def test_a_run_that_fails_is_named_and_the_others_go_on(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path
) -> None:
    methods = "rtn,rtn+weights=int4:g7"  # 7 divides no layer
    done = run("compare", tiny_model, "--methods", methods, "--calibration", calibration, "--data", pictures)
    assert done.code == 0
    assert "failed: rtn+weights=int4:g7 seed 0" in done.out


def test_it_is_an_error_if_every_run_fails(run: Run, tiny_model: Path, calibration: Path, pictures: Path) -> None:
    done = run(
        "compare", tiny_model, "--methods", "rtn,gptq", "--calibration", calibration, "--data", pictures,
        "--samples", 99, "--json",
    )  # fmt: skip
    line = error_line(done)
    assert "all 2 runs failed" in line
    assert "99" in line


def test_calibrating_on_what_is_evaluated_is_refused(run: Run, tiny_model: Path, calibration: Path) -> None:
    done = run("compare", tiny_model, "--methods", "rtn", "--calibration", calibration, "--data", calibration)
    assert "do not overlap" in error_line(done)
    done = run("quantize", tiny_model, "--calibration", calibration, "--evaluate", calibration, "-o", "out")
    assert "do not overlap" in error_line(done)


def test_a_report_is_not_overwritten(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    done = run("compare", tiny_model, "--calibration", "c", "--data", "d", "-o", ".")
    assert "report.html already" in error_line(done)
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize("methods", ["rtn,gtpq", ""])
def test_unknown_or_no_methods_are_refused_before_the_work(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, methods: str
) -> None:
    done = run("compare", tiny_model, "--methods", methods, "--calibration", calibration, "--data", pictures)
    assert ("did you mean 'gptq'" in error_line(done)) == bool(methods)


def test_ranks_of_weights_alone_beside_activations_too_carry_a_warning(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path
) -> None:
    data = ("--calibration", calibration, "--data", pictures)
    done = run("compare", tiny_model, "--methods", "rtn,repq", *data, "-o", "mixed")
    assert "rtn quantize weights alone, repq activations too" in " ".join(done.err.split() + done.out.split())
    assert "rtn quantize weights alone, repq activations too" in Path("mixed/report.html").read_text()
    done = run("compare", tiny_model, "--methods", "rtn,repq", "--activations", "int4", *data, "-o", "alike")
    assert "weights alone" not in done.err + done.out
    assert "weights alone" not in Path("alike/report.html").read_text()


def test_a_text_alone_is_cut_in_two_and_a_method_without_the_format_is_named(run: Run, tmp_path: Path) -> None:
    llama = save_language_model(tmp_path / "llama")
    lines = [" ".join(("the cat", "an inn", "a dog")[(i * i + j) % 3] for j in range(4)) for i in range(80)]
    Path("text.txt").write_text("\n".join(lines))
    methods = "rtn,hqq,squeezellm,squeezellm+weights=nuq3"
    done = run(
        "compare", llama, "--methods", methods, "--weights", "int3:g16", "--evaluate", "text.txt", "--samples", 2,
        "--length", 8, "--count", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [row["label"] for row in done.data["runs"]] == ["rtn", "hqq", "squeezellm+weights=nuq3"]
    assert [one["method"] for one in done.data["failures"]] == ["squeezellm"]
    assert "try nuq3" in done.data["failures"][0]["error"]


def test_pictures_are_not_cut_in_two(run: Run, tiny_model: Path, pictures: Path) -> None:
    assert "--calibration" in error_line(run("compare", tiny_model, "--methods", "rtn", "--data", pictures))
