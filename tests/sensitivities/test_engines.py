"""Probes on other engines: the table of one process, bit for bit, also where a worker was killed; one was resumed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.test_ranks import environment, one_thread

from dither.engine.local import ProcessPool
from dither.sensitivities import SENSITIVITIES
from dither.sensitivity import measure

HOW: dict[str, Any] = {"options": ["int2", "int4"]}
BATCHES = "[{'input_ids': (torch.arange(14).reshape(2, 7) * 3 + shift) % 40} for shift in range(3)]"
PROBED = ("kl", "error", "fisher", "quadratic", "augmented+pairs=measured", "pmpq")

# KL whose first worker that probes a certain unit is killed by the system; importable by the workers.
FRAGILE = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from dither.sensitivities.kl import KL

@dataclass(frozen=True)
class Fragile(KL):
    def _unit(self, probe, quantizers, reference, number):
        mark = Path(__file__).with_name("killed")
        if number == 5 and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._unit(probe, quantizers, reference, number)
"""
DRIVER = f"""
import json, os, sys
import torch
from dither.engine.cluster import RayTasks
from dither.provenance import model_sha256
from dither.models.network import open_network
from dither.sensitivity import measure
from fragile import Fragile

if __name__ == "__main__":
    batches = {BATCHES}
    model = open_network(sys.argv[1]).model
    found = {{"driver": os.getpid(), "hashes": [model_sha256(model.state_dict().items())]}}
    with RayTasks(workers=2) as ray:
        for name in json.loads(sys.argv[2]):
            table = measure(model, Fragile() if name == "kl" else name, batches, engine=ray, **json.loads(sys.argv[3]))
            found[name] = table.scores.tolist()
    found["hashes"].append(model_sha256(model.state_dict().items()))
    print(json.dumps(found))
"""


@pytest.fixture(name="llama")
def written(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    tiny("LlamaForCausalLM").model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def batches() -> list[dict[str, torch.Tensor]]:
    found: list[dict[str, torch.Tensor]] = eval(BATCHES)
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs dither[ray]")
def test_ray_gives_the_table_of_one_process_though_a_worker_was_killed(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "driver.py").write_text(DRIVER)
    settings = environment()
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), settings["PYTHONPATH"]])
    command = [sys.executable, str(tmp_path / "driver.py"), str(llama), json.dumps(PROBED), json.dumps(HOW)]
    done = subprocess.run(command, check=False, env=settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    killed = (tmp_path / "killed").read_text()
    assert killed and int(killed) != found["driver"]
    assert found["hashes"][0] == found["hashes"][1]
    with one_thread():
        for name in PROBED:
            assert found[name] == measure(llama, name, batches(), **HOW).scores.tolist(), name


@pytest.mark.slow
def test_a_pool_gives_the_table_of_one_process_by_every_sensitivity(llama: Path) -> None:
    names = [f"{name}+probes=3" if name == "hawq-v2" else name for name in SENSITIVITIES]
    with one_thread(), ProcessPool(2) as pool:
        for name in [*names, "augmented+pairs=rowsum"]:
            there, here = measure(llama, name, batches(), engine=pool, **HOW), measure(llama, name, batches(), **HOW)
            there.facts["time_s"] = here.facts["time_s"]  # type: ignore[index]
            assert there.to_data() == here.to_data(), name


@pytest.mark.slow
def test_a_pool_goes_on_from_the_rows_that_were_kept(llama: Path, tmp_path: Path) -> None:
    whole = measure(llama, "kl", batches(), **HOW)

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with one_thread(), ProcessPool(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            measure(llama, "kl", batches(), scores=tmp_path, engine=pool, progress=stop, **HOW)
        assert len(list(tmp_path.rglob("parts/*.json"))) == 3
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("parts/*.json")}
        seen: list[int] = []
        asked = pool.map

        def counted(function: Any, tasks: Any) -> Any:
            seen.append(len(tasks))
            return asked(function, tasks)

        pool.map = counted  # type: ignore[method-assign]
        found = measure(llama, "kl", batches(), scores=tmp_path, engine=pool, **HOW)
    assert seen == [len(whole.units) - len(kept)]
    assert found.scores.tolist() == whole.scores.tolist()
