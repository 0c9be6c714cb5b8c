"""Runs that do not reach their end: killed, interrupted, and gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Run, error_line, noise_pictures

from dither.sensitivities import base

# The tensors of the second unit are written, the record that says they are whole is not: then the process is killed.
DIES = """
import os, signal, sys
from dither import unfinished
from dither.cli import main
write, written = unfinished.write_tensors, []
def last_words(*arguments):
    write(*arguments)
    written.append(arguments)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
unfinished.write_tensors = last_words
sys.argv[0] = "dither"
main()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_file(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    arguments = [str(part) for part in ("quantize", tiny_model, "--calibration", calibration, "--activations", "int4")]
    killed = subprocess.run(
        [sys.executable, "-c", DIES, *arguments, "-o", "out"], cwd=tmp_path, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    kept = {path.name for path in (tmp_path / "out" / "unfinished").glob("*.json")}
    assert len(kept) == 2  # the fingerprint and the first unit

    assert "pass --resume" in error_line(run(*arguments, "-o", "out"))
    other = error_line(run(*arguments, "-o", "out", "--resume", "--weights", "int3"))
    assert "another recipe" in other
    other = error_line(run(*arguments, "-o", "out", "--resume", "--samples", 4))
    assert "another calibration data" in other

    assert run(*arguments, "-o", "out", "--resume").code == 0
    assert run(*arguments, "-o", "whole").code == 0
    resumed, whole = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out" / "unfinished").exists()


# Four parts of a measurement are kept, then the process is killed.
PROBES_DIE = """
import os, signal, sys
from dither.sensitivities import base
from dither.cli import main
write, written = base.write_json, []
def last_words(*arguments):
    write(*arguments)
    written.append(arguments)
    if len(written) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
base.write_json = last_words
sys.argv[0] = "dither"
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "by", "method"),
    [("inspect", "kl", "gptq"), ("allocate", "hawq-v2+probes=6", "rtn"), ("allocate", "quadratic", "gptq")],
)
def test_a_killed_measurement_goes_on_and_gives_the_same_table(
    command: str, by: str, method: str, run: Run, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    arguments = [command, tiny_model, "--calibration", calibration, "--options", "int2:channel,int4:channel"]
    arguments += ["--method", method, "--batch-size", "4"]
    arguments += ["--sensitivity", by] if command == "inspect" else ["--by", by, "--bits", "3.5"]
    name = "which.html" if command == "inspect" else "bits.yaml"
    texts = [str(part) for part in arguments]
    killed = subprocess.run(
        [sys.executable, "-c", PROBES_DIE, *texts, "-o", name], cwd=tmp_path, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / name).exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("parts/*.json")}
    assert len(kept) == 4
    seen: list[tuple[str, int]] = []
    write = base.write_json

    def watched(data: object, path: Path) -> None:
        seen.append((path.name, len(seen)))
        write(data, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "write_json", watched)
        assert run(*arguments, "-o", name).code == 0
    assert seen and not {path.name for path in kept} & {one for one, _ in seen}
    (tmp_path / "whole").mkdir()
    assert run(*arguments, "-o", f"whole/{name}").code == 0
    resumed, whole = (json.loads(path.read_text()) for path in sorted(tmp_path.rglob("table.json")))
    assert resumed["facts"].pop("time_s") != whole["facts"].pop("time_s")
    assert resumed == whole


def test_an_interrupted_measurement_says_how_to_go_on(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("inspect", tiny_model, "--sensitivity", "kl", "--calibration", calibration, "--options", "int2")
    write = base.write_json

    def interrupt(data: object, path: Path) -> None:
        write(data, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base, "write_json", interrupt)
        done = run(*arguments, "-o", "kl.html")
    assert done.code == 130
    assert done.err == "interrupted (finished parts are kept in 'kl.scores': repeat the command to go on)\n"
    assert run(*arguments, "-o", "kl.html").code == 0


def test_an_interrupted_run_says_how_to_go_on(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.unfinished import Unfinished

    write = Unfinished.write

    def interrupt(self: Unfinished, block: object) -> None:
        write(self, block)
        raise KeyboardInterrupt

    arguments = ("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "write", interrupt)
        done = run(*arguments)
    assert done.code == 130
    assert done.out == ""
    line = "interrupted (finished units are kept in 'out': repeat the command with --resume to go on)\n"
    assert done.err == line
    assert run(*arguments, "--resume").code == 0


def test_another_model_is_refused_by_a_resume(
    run: Run, tiny_model: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.unfinished import Unfinished

    def interrupt(self: Unfinished, block: object) -> None:
        raise KeyboardInterrupt  # a signal may reach another thread first, and the run end before it is noticed

    pictures = noise_pictures(tmp_path / "pictures", seed=3, count=4)
    arguments = ("--calibration", pictures, "-m", "rtn", "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "write", interrupt)
        assert run("quantize", tiny_model, *arguments).code == 130
    changed = tmp_path / "changed"
    changed.mkdir()
    from safetensors.torch import load_file, save_file

    for name in os.listdir(tiny_model):
        (changed / name).write_bytes((tiny_model / name).read_bytes())
    state = load_file(changed / "model.safetensors")
    state["classifier.bias"] += 1
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    assert "another model" in error_line(run("quantize", changed, *arguments, "--resume"))


def test_a_damaged_unit_is_named(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.unfinished import Unfinished

    write = Unfinished.write

    def interrupt(self: Unfinished, block: object) -> None:
        write(self, block)
        raise KeyboardInterrupt

    arguments = ("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "write", interrupt)
        run(*arguments)
    unit = next((tmp_path / "out" / "unfinished").glob("*.safetensors"))
    unit.write_bytes(unit.read_bytes()[:50])
    assert "is damaged" in error_line(run(*arguments, "--resume"))
