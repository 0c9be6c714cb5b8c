"""Exports are read back before they count, leave nothing when they fail, and come from folders and results alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dither
from dither import storage
from dither.errors import DependencyError, InputError, PathError, StorageError
from dither.export import export as module
from dither.export import folder as folders

Quantized = Callable[..., dither.Result]


def test_a_result_in_memory_and_its_folder_export_the_same(quantized: Quantized, tmp_path: Path) -> None:
    result = quantized("int4:g32:sym")
    result.save(tmp_path / "out")
    one = dither.export(result, "compressed-tensors", tmp_path / "one")
    two = dither.export(tmp_path / "out", "compressed-tensors", tmp_path / "two")
    assert one["files"] == two["files"]
    for file in one["files"]:
        assert (tmp_path / "one" / file["name"]).read_bytes() == (tmp_path / "two" / file["name"]).read_bytes()


def tampering(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the writer of tensors change one bit of a tensor behind everybody's back."""

    def saved(tensors: dict[str, Any], path: Path, metadata: Any = None) -> None:
        changed = {key: x.clone() for key, x in tensors.items()}
        if name in changed:
            changed[name].view(torch.uint8).view(-1)[0] ^= 16
        save_file(changed, path, metadata)

    monkeypatch.setattr(storage, "save_file", saved)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_changed_bit_is_found_and_nothing_is_left(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    source = quantized("int4:g32:asym")
    tampering(monkeypatch, f"model.layers.1.mlp.up_proj.{part}")
    with pytest.raises(StorageError, match=r"model.layers.1.mlp.up_proj: the weight was read back different"):
        dither.export(source, "compressed-tensors", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


@pytest.mark.parametrize("to", ["compressed-tensors", "dequantized"])
def test_a_changed_kept_tensor_is_found(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    source = quantized("int4:g32:sym")
    tampering(monkeypatch, "model.norm.weight")
    with pytest.raises(StorageError, match=r"model.norm.weight was read back different"):
        dither.export(source, to, tmp_path / "ct")


def test_an_empty_folder_that_was_there_stays(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantized("int4:g32:sym")
    (tmp_path / "ct").mkdir()
    tampering(monkeypatch, "model.norm.weight")
    with pytest.raises(StorageError):
        dither.export(source, "compressed-tensors", tmp_path / "ct")
    assert list((tmp_path / "ct").iterdir()) == []


def test_large_networks_are_written_in_shards(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    source = quantized("int4:g32:sym")
    monkeypatch.setattr(folders, "SHARD_BYTES", 20_000)
    report = dither.export(source, "dequantized", tmp_path / "dense")
    shards = [file["name"] for file in report["files"] if file["name"].startswith("model-")]
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    listed = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(listed) == {name for shard in shards for name in load_file(tmp_path / "dense" / shard)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    layer = source.model.get_submodule("model.layers.0.mlp.up_proj")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, layer.weight.half())


def test_results_that_no_other_format_holds_are_exported_dequantized(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("nf4:g32", overrides={"*.down_proj": "int4:asym:realzero", "*.v_proj": "int3:dual"})
    report = dither.export(source, "dequantized", tmp_path / "dense", dtype="float32")
    assert report["largest_change"] == 0


def test_a_bias_that_the_architecture_lacks_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("int4:g32:sym")
    source.model.get_submodule("model.layers.1.mlp.up_proj").bias = nn.Parameter(torch.zeros(96))
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.bias: LlamaForCausalLM has no such tensor"):
        dither.export(source, "dequantized", tmp_path / "dense")


def test_wrong_names_and_folders_are_refused(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("int4:g32:sym")
    with pytest.raises(InputError, match="did you mean 'gguf'"):
        dither.export(source, "guf", tmp_path / "x")
    with pytest.raises(InputError, match="dtype: expected auto"):
        dither.export(source, "dequantized", tmp_path / "x", dtype="int8")
    with pytest.raises(InputError, match="is not empty"):
        dither.export(source, "dequantized", tmp_path / "llama")
    with pytest.raises(InputError, match="was not written by dither quantize"):
        dither.export(tmp_path / "llama", "dequantized", tmp_path / "x")
    with pytest.raises(PathError, match="does not exist"):
        dither.export(tmp_path / "nowhere", "dequantized", tmp_path / "x")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr(module, "import_module", fail)
    with pytest.raises(DependencyError, match=r"exporting to gguf needs gguf; install dither\[export\]"):
        module._writer("gguf")


def test_a_vision_model_is_exported_dequantized(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("ViTForImageClassification")
    result = dither.quantize(network.model, dither.RTN(weights="int4", activations="none"), network.batch(2))
    report = dither.export(result, "dequantized", tmp_path / "dense", dtype="float32")
    assert report["largest_change"] == 0
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    batch = network.batch(2)
    assert torch.allclose(network.logits(batch, model), network.logits(batch, result.model), atol=1e-5)
