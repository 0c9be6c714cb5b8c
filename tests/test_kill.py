"""A run that is killed by the operating system and gone on with writes the bytes of one that was left alone."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither

# Says which unit is finished and works on, until somebody kills it.
CHILD = """
import sys
import torch
import dither
model, output, stream = sys.argv[1:]
batches = [{"input_ids": torch.arange(14).reshape(2, 7) + shift} for shift in range(3)]
dither.quantize(model, "gptq", batches, output=output, stream=stream == "True",
    progress=lambda name, done, total: print(name, done, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_killed_run_is_resumed_with_the_same_bytes(tiny: Callable[..., Any], tmp_path: Path, stream: bool) -> None:
    tiny("LlamaForCausalLM", num_hidden_layers=6).model.save_pretrained(tmp_path / "llama", max_shard_size="60KB")
    arguments = [str(tmp_path / "llama"), str(tmp_path / "out"), str(stream)]
    with subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(3)]
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert said[2] == "model.layers.2 3\n"
    kept = {path.stem for path in (tmp_path / "out" / "unfinished").glob("*.json")} - {"fingerprint"}
    assert {"model.layers.0", "model.layers.1", "model.layers.2"} <= kept < {f"model.layers.{n}" for n in range(6)}
    assert not (tmp_path / "out" / "config.json").exists()

    batches = [{"input_ids": torch.arange(14).reshape(2, 7) + shift} for shift in range(3)]
    calls: list[str] = []
    dither.quantize(
        tmp_path / "llama", "gptq", batches, output=tmp_path / "out", stream=stream, resume=True,
        progress=lambda name, done, total: calls.append(name),
    )  # fmt: skip
    dither.quantize(tmp_path / "llama", "gptq", batches, output=tmp_path / "whole", stream=stream)
    files = {path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith("report")}
    assert {"config.json", "model.safetensors", "provenance.json", "recipe.yaml"} <= files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out" / "unfinished").exists()
