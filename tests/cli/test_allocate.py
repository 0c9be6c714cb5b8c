"""`dither allocate`, `inspect --sensitivity` and `quantize --allocation`, as they are typed."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from tests.cli.conftest import Run, error_line

from dither.cli.options import read_bytes
from dither.errors import InputError
from dither.sensitivities.base import Measured, Probe
from dither.sensitivity import measure

FORMATS = ("--options", "int2:channel,int4:channel,int8:channel")


def test_from_a_budget_to_a_model_of_that_size(run: Run, tiny_model: Path, calibration: Path, tmp_path: Path) -> None:
    common = (tiny_model, "--calibration", calibration)
    done = run("allocate", *common, "--bits", 5.5, "--by", "error", *FORMATS, "-o", "bits.yaml")
    assert done.code == 0, done.err
    assert "optimal" in done.out
    assert "saved in bits.yaml" in done.out
    said = " ".join(done.out.split())
    assert f"dither quantize {tiny_model} --calibration {calibration} --method rtn --allocation bits.yaml" in said
    data = yaml.safe_load((tmp_path / "bits.yaml").read_text())
    assert data["bits"] <= 5.5
    assert "<svg" in (tmp_path / "bits.html").read_text()
    done = run("quantize", *common, "-m", "gptq", "--allocation", "bits.yaml", "-o", "out")
    assert done.code == 0, done.err
    assert f"{data['bits']:.4f} bits a weight, as the allocation promised" in done.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["allocation"]["as_promised"]
    plan = run("quantize", *common, "-m", "rtn", "--allocation", "bits.yaml", "--dry-run", "--json").data
    assert {row["name"]: row["weights"] for row in plan["layers"]} == data["layers"]


def test_several_budgets_are_solved_from_one_measurement(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    common = ("allocate", tiny_model, "--calibration", calibration, "--by", "error", *FORMATS, "-o", "bits.yaml")
    done = run(*common, "--bits", "4.5,5.5,4.5", "--json")
    assert done.code == 0, done.err
    assert done.data["files"] == ["bits-4.5.yaml", "bits-5.5.yaml"]
    assert [one["bits"] <= most for one, most in zip(done.data["allocations"], (4.5, 5.5), strict=True)] == [True] * 2
    (table,) = (tmp_path / "bits.scores").rglob("table.json")
    before = table.stat().st_mtime_ns
    assert "'bits.html' is there already" in error_line(run(*common, "--size", "20kB"))
    assert run(*common, "--size", "20kB", "--force", "--json").code == 0
    assert table.stat().st_mtime_ns == before


def test_files_that_are_there_are_replaced_only_by_force(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    common = (tiny_model, "--calibration", calibration, *FORMATS)
    allocate = ("allocate", *common, "--bits", 4.5, "--by", "error")
    inspect = ("inspect", *common, "--sensitivity", "error")
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "mine.html").write_text("mine")
    assert "'mine.yaml' is there already" in error_line(run(*allocate, "-o", "mine.yaml"))
    assert "'mine.html' is there already" in error_line(run(*inspect, "-o", "mine.html"))
    assert "is a folder" in error_line(run(*allocate, "-o", tmp_path, "--force"))
    assert "the allocation is YAML" in error_line(run(*allocate, "-o", "mine.html", "--force"))
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "mine.html"}  # nothing was measured either
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert run(*inspect, "-o", "mine.html", "--force").code == 0
    assert "<svg" in (tmp_path / "mine.html").read_text()


def test_a_budget_that_is_missing_or_cannot_be_met_is_said_in_a_line(
    run: Run, tiny_model: Path, calibration: Path
) -> None:
    common = ("allocate", tiny_model, "--calibration", calibration, "--by", "error", *FORMATS)
    assert "say how much it may take" in run(*common).err
    assert "bits a weight asked for" in error_line(run(*common, "--bits", 1))
    assert "no cost 'watts'" in error_line(run(*common, "--limit", "watts=3"))
    assert "did you mean 'hawq-v2'" in error_line(run(*common, "--bits", 4, "--by", "hawqv2"))


def test_inspecting_shows_which_units_hurt_and_how_sure_that_is(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    common = ("inspect", tiny_model, "--sensitivity", "kl", "--calibration", calibration, *FORMATS)
    done = run(*common, "-o", "kl.html")
    assert done.code == 0, done.err
    assert "± %" in done.out
    assert "<svg" in (tmp_path / "kl.html").read_text()
    data = run(*common, "--json").data
    assert data["kind"] == "allocation"
    assert len(data["units"][0]["scores"]) == 3
    assert data["units"][0]["errors"][0] > 0
    assert "--calibration" in run("inspect", tiny_model, "--sensitivity", "kl").err


@pytest.mark.parametrize(
    ("text", "expected"), [("3.2GB", 3.2e9), ("20 MB", 2e7), ("512KiB", 524288.0), ("1e6", 1e6), ("7", 7.0)]
)
def test_sizes_are_read(text: str, expected: float) -> None:
    assert read_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "big", "-3MB", "3XB", "1.2.3GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a size"):
        read_bytes(text)


def test_an_accuracy_is_met_at_the_least_size(run: Run, tiny_model: Path, calibration: Path, tmp_path: Path) -> None:
    common = ("allocate", tiny_model, "--calibration", calibration, "--by", "error")
    done = run(*common, "--accuracy", 0.9, "--options", "none,int8:channel,int3:channel", "-o", "bits.yaml")
    assert done.code == 0, done.err
    data = yaml.safe_load((tmp_path / "bits.yaml").read_text())
    assert data["requested"] == {"accuracy": 0.9} and data["solver"] == "bisection"
    assert data["status"].startswith("agreement ") and float(data["status"].split()[1]) >= 0.9
    assert "goes without a budget" in run(*common, "--accuracy", 0.9, "--bits", 4).err
    assert "a share of predictions such as 0.99" in error_line(run(*common, "--accuracy", 99))


def test_classes_of_layers_have_measures_and_budgets_of_their_own(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    common = ("allocate", tiny_model, "--calibration", calibration, *FORMATS, "--bits", "5,5.5")
    done = run(*common, "--by", "mixdq", "--class", "*mlp*=error", "--json", "-o", "bits.yaml")
    assert done.code == 0, done.err
    five, more = done.data["allocations"]
    assert five["solver"] == "mixdq" and five["bits"] <= 5 and more["bits"] <= 5.5
    assert five["facts"]["measures"] == {"*mlp*": "error", "the rest": "kl"}
    assert (
        run("quantize", tiny_model, "--calibration", calibration, "--allocation", "bits-5.yaml", "--dry-run").code == 0
    )
    done = run(*common, "--by", "vidit", "--class", "*mlp*", "--class", "*attention*=error", "--json")
    assert done.code == 0, done.err
    assert [one["solver"] for one in done.data["allocations"]] == ["vidit"] * 2
    assert "--class" in run(*common, "--by", "mixdq").err
    assert "--class" in run(*common, "--by", "kl", "--class", "*mlp*").err
    assert "nothing else" in run(*common, "--by", "mixdq", "--class", "*mlp*", "--solver", "dp").err


def test_a_beam_search_is_typed_like_any_allocator(run: Run, tiny_model: Path, calibration: Path) -> None:
    common = ("allocate", tiny_model, "--calibration", calibration, *FORMATS)
    done = run(*common, "--size", "20kB", "--by", "dp-beam+every=2+by=error", "--json")
    assert done.code == 0, done.err
    assert done.data["solver"] == "dp-beam" and done.data["size_bytes"] <= 20000
    assert "nothing else" in run(*common, "--accuracy", 0.9, "--by", "dp-beam").err


def test_an_allocation_is_verified_beside_an_even_mix(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    common = ("allocate", tiny_model, "--calibration", calibration, "--bits", 5.5, "--by", "error", *FORMATS)
    done = run(*common, "--verify", "-o", "bits.yaml")
    assert done.code == 0, done.err
    said = yaml.safe_load((tmp_path / "bits.yaml").read_text())["facts"]["verified"]
    assert 0 < said["kl"] < 1 and 0 < said["even_kl"] < 1
    assert said["even_bits"] <= 5.5 and said["judge_seed"] == 2
    word = "less than" if said["kl"] < said["even_kl"] else "no less than"
    assert f"{word} the {said['even_kl']:.3g} of formats mixed evenly" in " ".join(done.out.split())


def test_solved_weights_are_judged_on_other_samples_than_they_were_solved_on(
    tiny_model: Path, calibration: Path
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watch:
        name: ClassVar[str] = "watch"
        about: ClassVar[str] = "notes the samples"

        def measure(self, probe: Probe) -> Measured:
            assert probe.solved_on is not None
            seen.append((probe.batches[0], probe.solved_on[0]))
            return Measured(np.zeros((len(probe.units), len(probe.options))))

    for method, judge in (("rtn", None), ("gptq", None), ("gptq", 5), ("gptq", 0)):
        measure(tiny_model, Watch(), calibration, method=method, options=["int4:channel"], count=4, judge_seed=judge)
    own = seen[0][0]
    assert all(torch.equal(solved_on, own) for _, solved_on in seen)
    assert torch.equal(seen[3][0], own)
    judged = [one for one, _ in seen[:3]]
    assert not any(torch.equal(judged[a], judged[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
