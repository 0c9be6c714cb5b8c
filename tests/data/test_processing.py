"""Image processors: the model's own is loaded safely, the plain one does the arithmetic it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dither.data import default_processor, load_processor
from dither.data.processing import pixel_values
from dither.errors import InputError, PathError


def test_the_plain_processor_resizes_scales_and_normalizes() -> None:
    image = Image.new("RGB", (9, 5), (255, 0, 51))
    pixels = default_processor((2, 3), (0.5, 0.0, 0.2), (0.5, 1.0, 0.1))([image])["pixel_values"]
    assert pixels.shape == (1, 3, 2, 3)
    torch.testing.assert_close(pixels[0, :, 1, 2], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-6)


def test_the_plain_processor_turns_pictures_gray_for_one_channel() -> None:
    pixels = default_processor(2, (0.0,), (1.0,))([Image.new("RGB", (4, 4), (255, 255, 255))])["pixel_values"]
    torch.testing.assert_close(pixels, torch.ones(1, 1, 2, 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "mean", "std"),
    [(0, (0.5,), (0.5,)), (4, (0.5,) * 3, (0.5,)), (4, (0.5,) * 2, (0.5,) * 2), (4, (0.5,), (0.0,))],
)
def test_the_plain_processor_refuses_settings_that_make_no_sense(
    size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    with pytest.raises(InputError, match="expected"):
        default_processor(size, mean, std)


def test_the_plain_processor_returns_torch_tensors_alone() -> None:
    with pytest.raises(InputError, match="return_tensors='pt', got 'np'"):
        default_processor(4, (0.5,), (0.5,))([Image.new("L", (4, 4))], return_tensors="np")


def test_the_demo_models_own_processor_equals_the_plain_one(demo_model_folder: Path) -> None:
    own = load_processor(demo_model_folder)
    config = json.loads((demo_model_folder / "preprocessor_config.json").read_text())
    plain = default_processor(config["size"]["height"], config["image_mean"], config["image_std"])
    image = Image.effect_noise((40, 50), 60).convert("RGB")
    torch.testing.assert_close(pixel_values(own, [image], 3), pixel_values(plain, [image], 3), rtol=0, atol=1e-4)


def test_a_missing_folder_and_a_folder_without_a_processor_are_path_errors(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="which is no folder"):
        load_processor(tmp_path / "nowhere")
    with pytest.raises(PathError, match=r"expected preprocessor_config.json .* got none"):
        load_processor(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"image_processor_type": "NoSuchProcessor"}', "[]"])
def test_a_processor_that_transformers_does_not_know_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match="that transformers knows"):
        load_processor(tmp_path)


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "evil.Evil"}}))
    with pytest.raises(InputError, match="that transformers knows"):
        load_processor(tmp_path)
    assert not (tmp_path / "ran").exists()


def stack_without_resizing(images: list[Image.Image], *, return_tensors: str) -> dict[str, Any]:
    if len({image.size for image in images}) > 1:
        raise ValueError("all input arrays must have the same shape")
    return {"pixel_values": torch.zeros(len(images), 4, 4)}


def test_a_processor_that_does_not_resize_is_an_error() -> None:
    with pytest.raises(InputError, match="resize all pictures to one size"):
        pixel_values(stack_without_resizing, [Image.new("RGB", (1, 1)), Image.new("RGB", (2, 2))], 3)


def test_a_processor_that_returns_another_shape_or_key_is_an_error() -> None:
    with pytest.raises(InputError, match=r"of shape \(1, channels, height, width\), got \(1, 4, 4\)"):
        pixel_values(stack_without_resizing, [Image.new("RGB", (1, 1))], 3)
    with pytest.raises(InputError, match="pixel_values"):
        pixel_values(lambda images, *, return_tensors: {}, [Image.new("RGB", (1, 1))], 3)
    with pytest.raises(InputError, match="got list"):
        pixel_values(lambda images, *, return_tensors: {"pixel_values": []}, [Image.new("RGB", (1, 1))], 3)
