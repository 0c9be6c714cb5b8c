"""timm's classes with random weights. timm needs torchvision, which cannot be imported beside every build of torch.

So both lie in a folder of their own (`scripts/setup` installs it) and are imported in one process, where the
two operators that torchvision looks for are declared first.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(sys.prefix) / "timm"
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "deit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16,
    },
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "tf_efficientnet_lite0": {},
}  # fmt: skip
METHODS = (  # beside ERQ
    "ptq4vit+candidates=8+rounds=1", "noisyquant+candidates=8+reaches=4", "repquant+iterations=3+clip_steps=5",
)  # fmt: skip
BY_ALL = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto")
PROGRAM = """
import json, sys, tempfile
import torch
sys.path.append(sys.argv[1])
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
import dither
from dither.recipe import parse_method
found = {}
formats = {"weights": "int8", "activations": "int8"}
models, methods, by_all = (json.loads(text) for text in sys.argv[2:])
for name, settings in models.items():
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **settings).eval()
    pixels = torch.randn(3, 3, settings.get("img_size", 64), settings.get("img_size", 64))
    result = dither.quantize(model, dither.ERQ(**formats), pixels)
    others = {}
    for method in methods if name in by_all else ():
        other = dither.quantize(model, parse_method(method, formats), pixels)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            other.save(folder + "/out")
            empty = timm.create_model(name, pretrained=False, num_classes=5, **settings)
            again = dither.load(folder + "/out", into=empty)
            expected, got, loaded = (one(pixels) for one in (model, other.model, again))
        others[method] = [float((got - expected).norm() / expected.norm()), bool(torch.equal(loaded, got))]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected, got = model(pixels), result.model(pixels)
        result.save(folder + "/out")
        empty = timm.create_model(name, pretrained=False, num_classes=5, **settings)
        loaded = dither.load(folder + "/out", into=empty)(pixels)
    layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    rows = {row["name"]: row for row in result.report.data["coverage"]}
    found[name] = {
        "others": others,
        "error": float((got - expected).norm() / expected.norm()),
        "reloaded": bool(torch.equal(loaded, got)),
        "uncovered": [n for n in layers if n not in rows],
        "kept": {n: rows[n]["reason"] for n in layers if rows[n]["status"] == "kept"},
        "operands": len(result.report.data["operands"]),
        "folded": sum(row["reason"].startswith("reparameterized") for row in rows.values()),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if not FOLDER.is_dir():
        pytest.skip(f"no timm in {FOLDER}; scripts/setup installs it")
    command = [sys.executable, "-c", PROGRAM, str(FOLDER), *map(json.dumps, (MODELS, METHODS, BY_ALL))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_timm_model_is_covered_quantized_and_loaded_again(found: dict[str, Any], name: str) -> None:
    one = found[name]
    assert one["uncovered"] == []
    assert one["reloaded"]
    assert one["error"] < 0.3  # random weights and 8 bits; measured: 0.01 to 0.15
    assert one["kept"] == {}  # Conv2dSame too


@pytest.mark.slow
def test_timm_attention_is_quantized_and_its_norms_are_linked(found: dict[str, Any]) -> None:
    for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224"):
        assert (found[name]["operands"], found[name]["folded"]) == (8, 4)
    assert found["swin_tiny_patch4_window7_224"]["operands"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_vision_methods_pass_through_timms_classes(found: dict[str, Any], method: str) -> None:
    for name in BY_ALL:
        error, reloaded = found[name]["others"][method]
        assert reloaded
        assert error < 0.3  # as above
