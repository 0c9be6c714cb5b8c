"""What `compare` runs, and how its rows are told apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from dither import comparison
from dither.comparison import _jobs
from dither.data import open_images
from dither.errors import InputError
from dither.methods import ERQ, RTN


def test_configured_methods_of_one_name_get_labels_of_their_own() -> None:
    jobs = _jobs([ERQ(), RTN(), ERQ(dual=False), ERQ(absorb=False)], [], [])
    assert [label for label, _ in jobs] == ["erq", "rtn", "erq #2", "erq #3"]


def test_a_named_method_is_run_with_every_format_and_none_is_refused() -> None:
    jobs = _jobs(["rtn"], ["int3", "int4"], ["int4", "int8"])
    assert [(str(method.weights.bits), method.activations.bits) for _, method in jobs if method.activations] == [
        ("3", 4), ("3", 8), ("4", 4), ("4", 8),
    ]  # fmt: skip
    with pytest.raises(InputError, match="at least one method"):
        _jobs([], [], [])


def test_a_run_that_torch_gives_up_on_is_a_failure_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_model_folder: Path, demo_calibration_folder: Path,
    demo_test_folder: Path,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=8, num_labels=10)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    processor = "preprocessor_config.json"
    (tmp_path / processor).write_text((demo_model_folder / processor).read_text())
    whole = comparison.quantize

    def quantize(model: Any, method: Any, *args: Any, **options: Any) -> Any:
        if isinstance(method, RTN):
            raise RuntimeError("out of memory")
        return whole(model, method, *args, **options)

    monkeypatch.setattr(comparison, "quantize", quantize)
    pictures = open_images(demo_test_folder).first(8)
    unlabelled = type(pictures)(pictures.pictures, None, pictures.source)
    data = comparison.compare(tmp_path, ["rtn", "gptq"], demo_calibration_folder, unlabelled, count=4).data
    assert [failure["error"] for failure in data["failures"]] == ["out of memory"]
    assert [run["method"] for run in data["runs"]] == ["gptq"]
