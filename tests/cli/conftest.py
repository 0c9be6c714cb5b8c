"""A tiny random ViT, a few noise pictures, and a way to run commands in this process."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dither.cli import app

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class Outcome:
    """What a command did: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def data(self) -> Any:
        """Standard output as JSON; anything else there makes this fail."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `dither` with some arguments, in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("dither.cli.progress.EVERY_S", float("inf"))  # a busy machine says no more

    def invoke(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a command lets none out
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return invoke


def error_line(outcome: Outcome) -> str:
    """The one line that a refused command leaves, checked to be all there is."""
    assert outcome.code == 1, outcome.err
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    return outcome.err


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of two layers with random weights, its image processor and two classes."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("models") / "tiny_vit"
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + float("norm" in name and "weight" in name))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def noise_pictures(folder: Path, seed: int, count: int) -> Path:
    """Pictures of noise in the folders `cat` and `dog`."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        place = folder / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures to calibrate on."""
    return noise_pictures(tmp_path_factory.mktemp("pictures") / "calibration", seed=1, count=8)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten other pictures to evaluate on."""
    return noise_pictures(tmp_path_factory.mktemp("pictures") / "test", seed=2, count=10)


@pytest.fixture(scope="session")
def quantized(tiny_model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, quantized by RTN by the command line."""
    folder = tmp_path_factory.mktemp("quantized") / "out"
    arguments = ["quantize", tiny_model, "--calibration", calibration, "-m", "rtn", "-o", folder, "--quiet"]
    result = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--activations", "int4"]])
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def altered_model(tiny_model: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]:
    """A copy of the tiny model whose tensors, named as in memory, a function has changed."""

    def make(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        from transformers import ViTForImageClassification

        folder = tmp_path / "altered"
        folder.mkdir()
        for name in os.listdir(tiny_model):
            (folder / name).write_bytes((tiny_model / name).read_bytes())
        state = ViTForImageClassification.from_pretrained(tiny_model).state_dict()
        change(state)
        save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make
