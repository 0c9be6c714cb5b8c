"""`dither` under torchrun: `quantize` works with all ranks, and one of them speaks."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Run, error_line, noise_pictures
from tests.engine.test_ranks import TORCHRUN, files, one_thread, started


@pytest.mark.slow
def test_torchrun_starts_the_command_and_rank_0_alone_speaks(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    pictures = noise_pictures(tmp_path / "pictures", seed=1, count=8)
    arguments = ["quantize", tiny_model, "--calibration", pictures, "--batch-size", 3, "--weights", "int4", "--json"]
    command = [str(part) for part in [*TORCHRUN, "-m", "dither", *arguments, "-o", tmp_path / "ranks"]]
    done = started(command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "quantize"
    with one_thread():
        assert run(*arguments, "-o", tmp_path / "alone").code == 0
    assert files(tmp_path / "ranks") == files(tmp_path / "alone")


def test_other_commands_are_refused_under_torchrun_by_rank_0(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused = run("methods")
    assert error_line(refused) == "error: this command works in one process; start it without torchrun\n"
    monkeypatch.setenv("RANK", "1")
    assert (run("methods").code, run("methods").err) == (1, "")
