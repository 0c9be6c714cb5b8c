"""Interrupted runs: what was finished stays, a resumed run writes the same bytes, and another run is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
from dither.errors import InputError, ResumeError, StorageError

RECIPE = dither.ERQ(weights="int3", activations="int4", inputs="both", refine_steps=2)
FILES = ("model.safetensors", "config.json", "recipe.yaml", "provenance.json")


class StopError(Exception):
    """The interruption."""


@pytest.fixture(autouse=True)
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than these runs."""
    monkeypatch.setattr("dither.report.html.write_html", lambda data, path: path.write_text("a report"))


def interrupt_after(units: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if done == units:
            raise StopError

    return progress


@pytest.fixture
def network(odd: Callable[..., Any]) -> Any:
    return odd()


def run(network: Any, output: Path, resume: bool = False, units: int = 0, **changes: Any) -> dither.Result:
    options = {"method": RECIPE, "calibration": network.batch(5), **changes}
    return dither.quantize(network.model, output=output, resume=resume, progress=interrupt_after(units), **options)


@pytest.fixture
def interrupted(network: Any, tmp_path: Path) -> Path:
    with pytest.raises(StopError):
        run(network, tmp_path / "out", units=2)
    return tmp_path / "out"


@pytest.mark.parametrize("units", [1, 3, 4])
def test_a_resumed_run_gives_the_same_files_as_one_that_was_never_interrupted(
    network: Any, tmp_path: Path, units: int
) -> None:
    whole = run(network, tmp_path / "whole")
    with pytest.raises(StopError):
        run(network, tmp_path / "out", units=units)
    assert not (tmp_path / "out" / "config.json").exists()
    calls: list[tuple[str, int, int]] = []
    resumed = dither.quantize(
        network.model, RECIPE, network.batch(5), output=tmp_path / "out", resume=True, spill_budget=0,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out" / "unfinished").exists()
    assert calls == [(name, n, 4) for n, name in enumerate(["stem", "blocks.0", "blocks.1", "head"], start=1)]
    untimed = [
        [{k: v for k, v in row.items() if k != "time_s"} for row in r.report.data["layers"]] for r in (whole, resumed)
    ]
    assert untimed[0] == untimed[1]
    for key in ("operands", "coverage"):
        assert whole.report.data[key] == resumed.report.data[key]


def test_a_reparameterized_transformers_model_resumes_with_its_attention(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    network = tiny()
    run(network, tmp_path / "whole")
    with pytest.raises(StopError):
        run(network, tmp_path / "out", units=2)
    run(network, tmp_path / "out", resume=True)
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_resumes_there(network: Any, tmp_path: Path) -> None:
    run(network, tmp_path / "whole", device="cuda")
    with pytest.raises(StopError):
        run(network, tmp_path / "out", units=2, device="cuda")
    resumed = run(network, tmp_path / "out", resume=True, device="cuda")
    assert {x.device.type for x in resumed.model.state_dict().values()} == {"cuda"}
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_may_be_interrupted_again_and_again(network: Any, tmp_path: Path) -> None:
    run(network, tmp_path / "whole")
    for units in (1, 2, 3):
        with pytest.raises(StopError):
            run(network, tmp_path / "out", resume=units > 1, units=units)
    run(network, tmp_path / "out", resume=True)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_run_is_not_overwritten_unless_it_is_resumed(network: Any, interrupted: Path) -> None:
    with pytest.raises(InputError, match="holds an unfinished run; pass --resume"):
        run(network, interrupted)
    with pytest.raises(InputError, match="is not a model folder"):
        dither.load(interrupted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": dither.ERQ(weights="int4", activations="int4", inputs="both")}, "another recipe"),
        ({"calibration": torch.ones(5, 6, 7)}, "another calibration data"),
        ({"batch_size": 2}, "another calibration data"),
        ({"method": "rtn", "calibration": torch.ones(5, 6, 7)}, "another calibration data, recipe"),
    ],
)
def test_a_run_with_other_data_or_another_recipe_is_not_resumed(
    network: Any, interrupted: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ResumeError, match=words):
        run(network, interrupted, resume=True, **change)


def test_another_model_or_other_software_is_not_resumed(
    odd: Callable[..., Any], network: Any, interrupted: Path
) -> None:
    with pytest.raises(ResumeError, match="another model; repeat its command, or choose another output"):
        run(odd(seed=1), interrupted, resume=True)
    file = interrupted / "unfinished" / "fingerprint.json"
    found = json.loads(file.read_text())
    found["software or device"]["torch"] = "1.0"
    file.write_text(json.dumps(found))
    with pytest.raises(ResumeError, match="another software or device"):
        run(network, interrupted, resume=True)
    file.write_text("{")
    with pytest.raises(ResumeError, match="cannot be read"):
        run(network, interrupted, resume=True)


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("blocks.0.safetensors", flip),
        ("blocks.0.safetensors", lambda content: content[:-9]),
        ("blocks.0.safetensors", lambda content: b""),
        ("blocks.0.json", lambda content: content[:-9]),
        ("blocks.0.json", lambda content: b"{}"),
        ("stem.json", lambda content: content.replace(b'"stem"', b'"team"')),
    ],
)
def test_a_damaged_file_is_named(network: Any, interrupted: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    file = interrupted / "unfinished" / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ResumeError, match=rf"{name.partition('.')[0]}.*\.json' is damaged"):
        run(network, interrupted, resume=True)


def test_a_missing_tensor_file_is_damage_and_a_missing_record_only_work(network: Any, interrupted: Path) -> None:
    (interrupted / "unfinished" / "stem.safetensors").unlink()
    with pytest.raises(ResumeError, match="stem"):
        run(network, interrupted, resume=True)
    (interrupted / "unfinished" / "stem.json").unlink()
    run(network, interrupted, resume=True)


def test_resuming_where_nothing_was_begun_begins(network: Any, tmp_path: Path) -> None:
    run(network, tmp_path / "out", resume=True)
    with pytest.raises(InputError, match="is not empty"):
        run(network, tmp_path / "out", resume=True)


def test_a_disk_that_fills_up_during_the_run_is_one_clear_error(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither import storage

    kept, count = storage.save_file, [0]

    def filling(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device")
        kept(*arguments)

    monkeypatch.setattr(storage, "save_file", filling)
    with pytest.raises(StorageError, match=r"blocks\.0\.safetensors': .*No space left"):
        run(network, tmp_path / "out")
    run(network, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "config.json").exists()
