"""Whatever is wrong with what a user gives: one line that names it, exit code 1, and nothing that looks finished."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.conftest import Run, error_line

Altered = Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]
FIRST = "vit.layers.0.attention.q_proj"


@pytest.fixture
def refused(run: Run, tiny_model: Path, calibration: Path, tmp_path: Path) -> Callable[..., str]:
    """Quantize with something wrong; gives the error line and checks that nothing finished was left."""

    def quantize(*arguments: object, model: object = tiny_model, pictures: object = calibration) -> str:
        line = error_line(run("quantize", model, "--calibration", pictures, "-m", "rtn", "-o", "out", *arguments))
        assert not (tmp_path / "out" / "config.json").exists()
        return line

    return quantize


def test_a_missing_model(refused: Callable[..., str]) -> None:
    assert "model folder 'nowhere' does not exist" in refused(model="nowhere")


def test_a_folder_that_is_no_model(refused: Callable[..., str], calibration: Path) -> None:
    assert "has no config.json" in refused(model=calibration)


def test_a_corrupt_weight_file(refused: Callable[..., str], altered_model: Altered) -> None:
    folder = altered_model(lambda state: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be loaded" in refused(model=folder)


def test_a_model_that_lacks_weights(refused: Callable[..., str], altered_model: Altered) -> None:
    folder = altered_model(lambda state: state.pop("classifier.weight"))
    assert "classifier.weight" in refused(model=folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_their_module(
    refused: Callable[..., str], altered_model: Altered, value: float
) -> None:
    folder = altered_model(lambda state: state[f"{FIRST}.weight"].view(-1)[:1].fill_(value))
    line = refused(model=folder)
    assert f"{FIRST}.weight" in line
    assert "NaN or Inf" in line


def test_activations_that_overflow_name_their_module(refused: Callable[..., str], altered_model: Altered) -> None:
    folder = altered_model(lambda state: state["vit.layers.0.mlp.fc1.weight"].fill_(3e38))
    line = refused("--activations", "int4", model=folder)
    assert "vit.layers.0.mlp.fc2" in line
    assert "NaN or Inf" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--weights", "imt4"), "did you mean 'int4'"),
        (("--weights", "int4:chanel"), "did you mean 'channel'"),
        (("--weights", "int9"), "bits must be 1 to 8"),
        (("--weights", "log2-4"), "stores weights as one of int"),
        (("--activations", "int4:g8"), "tensor"),
        (("--weights", "int4:g7"), "7"),
        (("--set", "dampin=1"), "no field 'dampin'"),
        (("--set", "inputs=fq"), "inputs"),
        (("--size", "2MB"), "--size goes with the method zeroq, not with rtn; dither allocate --size"),
        (("--prune", "0.3"), "--prune goes with the method udfc, not with rtn"),
        (("--skip", "clasifier"), "did you mean 'classifier'"),
        (("--override", "vit.layer.0.*=int8"), "matches no layer"),
        (("--override", "classifier=int0"), "bits must be 1 to 8"),
        (("--samples", "9"), "between 1 and the 8 pictures"),
        (("--device", "tpu9"), "--device 'tpu9' cannot be used"),
        (("--evaluate", "nowhere"), "does not exist"),
    ],
)
def test_unknown_or_unfit_settings(refused: Callable[..., str], arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(*arguments)


def test_a_group_size_that_does_not_divide_names_the_layer(refused: Callable[..., str]) -> None:
    assert "vit.embeddings.patch_embeddings.projection" in refused("--weights", "int4:g32")  # 48 inputs


def test_fields_may_follow_a_method_s_name(run: Run, tiny_model: Path, calibration: Path) -> None:
    plan = ("quantize", tiny_model, "--calibration", calibration, "--dry-run", "-m")
    assert run(*plan, "gptq+damping=0.1").code == 0
    assert "damping: Input should be" in error_line(run(*plan, "gptq+damping=-1"))


def test_an_unknown_method(run: Run, tiny_model: Path, calibration: Path) -> None:
    line = error_line(run("quantize", tiny_model, "--calibration", calibration, "-m", "gtpq", "-o", "out"))
    assert "did you mean 'gptq'" in line


def test_a_gpu_that_is_not_there(refused: Callable[..., str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "cuda" in refused("--device", "cuda")


def test_an_empty_picture_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "got none" in refused(pictures="empty")


def test_a_picture_that_is_damaged_is_named(refused: Callable[..., str], calibration: Path, tmp_path: Path) -> None:
    shutil.copytree(calibration, tmp_path / "pictures")
    (tmp_path / "pictures" / "cat" / "00.png").write_bytes(b"no picture")
    assert "cat/00.png" in refused(pictures="pictures")


def test_an_archive_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", wrong=np.zeros(3))
    assert "no jpeg" in refused(pictures="a.npz")


def test_a_model_of_other_channels(refused: Callable[..., str], altered_model: Altered, tmp_path: Path) -> None:
    name = "vit.embeddings.patch_embeddings.projection.weight"
    folder = altered_model(lambda state: state.update({name: state[name][:, :1].contiguous()}))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_channels": 3', '"num_channels": 1'))
    assert "1 channels" in refused(model=folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: [", "is not YAML"),
        ("weights: int4", "is not a recipe"),
        ("{schema: 2, method: rtn}", "schema 1"),
        ("{schema: 1, method: rtn, wieghts: int4}", "did you mean 'weights'"),
    ],
)
def test_a_recipe_that_is_none(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    arguments = ("quantize", tiny_model, "--calibration", calibration, "--recipe")
    assert said in error_line(run(*arguments, "r.yaml", "-o", "out"))
    assert "does not exist" in error_line(run(*arguments, "no.yaml", "-o", "out"))


def test_an_output_that_is_taken_is_refused_before_the_work(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in refused(model="nowhere")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused(model="nowhere")


def test_an_output_that_cannot_be_made(run: Run, tiny_model: Path, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "-o", "file/out")
    assert "cannot write" in error_line(done)


def test_a_disk_that_fills_up_can_be_resumed(
    run: Run, tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither import storage

    def full(tensors: object, path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ("quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        assert "No space left" in error_line(run(*arguments))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".safetensors", ".partial")]
    assert run(*arguments, "--resume").code == 0


def test_a_quantized_model_is_not_quantized_again(run: Run, quantized: Path, calibration: Path) -> None:
    done = run("quantize", quantized, "--calibration", calibration, "-m", "rtn", "-o", "out")
    assert "is quantized already; give the model that it was made from" in error_line(done)


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_other_commands_refuse_what_is_no_model(run: Run, command: str, pictures: Path) -> None:
    data = ("--data", pictures) if command == "evaluate" else ()
    assert "does not exist" in error_line(run(command, "nowhere", *data))
    assert "no config.json" in error_line(run(command, pictures, *data))


def test_a_damaged_report_is_named(run: Run, quantized: Path, tmp_path: Path, pictures: Path) -> None:
    broken = shutil.copytree(quantized, tmp_path / "broken")
    (broken / "report.json").write_text("{")
    assert "report.json" in error_line(run("inspect", broken))
    assert "report.json" in error_line(run("evaluate", broken, "--data", pictures))
