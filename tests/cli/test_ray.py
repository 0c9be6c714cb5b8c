"""`--engine ray`: trials of a search on a cluster are the trials of one process."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Run
from tests.engine.test_ranks import one_thread, started


def trials(folder: Path) -> list[dict[str, Any]]:
    """Configurations and figures in the order of their numbers, without times."""
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()[1:]]
    kept = [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]
    return sorted(kept, key=lambda row: row["number"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs dither[ray]")
def test_trials_of_a_search_run_on_ray(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    search = [
        "tune", tiny_model, "--calibration", calibration, "--data", pictures, "--methods", "rtn", "--trials", 4,
        "--strategy", "random", "--workers", 2, "--quiet", "-o",
    ]  # fmt: skip
    command = [sys.executable, "-m", "dither", *map(str, search), str(tmp_path / "far"), "--engine", "ray"]
    done = started(command)
    assert done.returncode == 0, done.stderr
    with one_thread():
        assert run(*search, tmp_path / "here").code == 0
    assert len(trials(tmp_path / "here")) == 4
    assert trials(tmp_path / "far") == trials(tmp_path / "here")
