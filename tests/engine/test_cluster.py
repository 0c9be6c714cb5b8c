"""Ray: the bytes of one process, also where a worker was killed during the run."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_ranks import environment, files, one_thread

import dither
from dither.engine.cluster import RayTasks
from dither.errors import DependencyError, InputError
from dither.recipe import build_method

ray_is_there = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs dither[ray]")

# GPTQ whose first worker that solves a wide layer is killed by the system; importable by the workers.
FRAGILE = """
import os, signal
from pathlib import Path
from dither.methods.gptq import GPTQ

class Fragile(GPTQ):
    def solve(self, task):
        mark = Path(__file__).with_name("killed")
        if task.name.endswith("layers.1.mlp.down_proj") and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().solve(task)
"""
DRIVER = """
import json, operator, os, sys
from functools import partial
import torch
import dither
from dither.engine.cluster import RayTasks
from dither.errors import SpecError
from dither.formats.spec import QuantSpec
from fragile import Fragile

if __name__ == "__main__":
    model, output = sys.argv[1:]
    batches = [{"input_ids": (torch.arange(14).reshape(2, 7) * 3 + shift) % 40} for shift in range(3)]
    found = {}
    with RayTasks(workers=2) as ray:
        found["order"] = list(ray.map(partial(operator.mul, 2), range(6)))
        specs = ray.map(QuantSpec.parse, ["int4", "int9"])
        next(specs)
        try:
            next(specs)
        except SpecError as error:
            found["error"] = str(error)
        weight = torch.ones(64, 64, dtype=torch.bfloat16)
        found["tensors"] = [bool(torch.equal(x, weight)) for x in ray.map(torch.Tensor.clone, [weight, weight])]
        dither.quantize(model, Fragile(weights="int4:g16"), batches, output=output, engine=ray)
    found["driver"] = os.getpid()
    print(json.dumps(found))
"""


@ray_is_there
@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_byte(tiny: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    tiny("LlamaForCausalLM").model.save_pretrained(tmp_path / "llama")
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "driver.py").write_text(DRIVER)
    settings = environment()
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), settings["PYTHONPATH"]])
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "llama"), str(tmp_path / "out")]
    done = subprocess.run(command, check=False, env=settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["order"] == [0, 2, 4, 6, 8, 10]
    assert "bits must be 1 to 8" in found["error"]
    assert found["tensors"] == [True, True]
    killed = (tmp_path / "killed").read_text()
    assert killed and int(killed) != found["driver"]
    batches = [{"input_ids": (torch.arange(14).reshape(2, 7) * 3 + shift) % 40} for shift in range(3)]
    with one_thread():
        method = build_method("gptq", {"weights": "int4:g16"})
        dither.quantize(tmp_path / "llama", method, batches, output=tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


@ray_is_there
@pytest.mark.slow
def test_an_address_without_a_cluster_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = (
        "from dither.engine.cluster import RayTasks\nfrom dither.errors import InputError\n"
        "try:\n    RayTasks('auto').__enter__()\nexcept InputError as error:\n    print(error)\n"
    )
    settings = environment() | {"RAY_TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, env=settings, capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("no Ray cluster at 'auto': ") and "ray start --head" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"install dither\[ray\]"):
        RayTasks()
    assert issubclass(InputError, ValueError)
