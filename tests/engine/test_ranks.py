"""Ranks: two of them write the bytes of one process, also when they were killed and went on."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import dither
from dither.engine.opened import opened, team_of
from dither.engine.ranks import Ranks, dealt, own_device
from dither.engine.team import Alone
from dither.errors import InputError
from dither.models.network import open_network
from dither.pipeline import begin

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# What both a rank and this process run: a job is [model, method, batches, options]; states come as hashes.
SHARED = """
import hashlib, json, os, sys
import torch
import dither
from dither.recipe import build_method

def batches(model, count):
    if "llama" in model:
        return [{"input_ids": (torch.arange(14).reshape(2, 7) * 3 + shift) % 40} for shift in range(count)]
    return [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]

def work(model, method, fields, count, output, **options):
    found = dither.quantize(model, build_method(method, fields), batches(model, count), output=output, **options)
    digest = hashlib.sha256()
    for name, x in found.network.tensors():
        digest.update(name.encode() + x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    layers = [{k: v for k, v in one.items() if k != "time_s"} for one in found.report.data["layers"]]
    return digest.hexdigest(), json.loads(json.dumps([layers, found.report.data["operands"]]))
"""
JOBS = (
    SHARED
    + """
from dither.engine.ranks import Ranks
place, jobs = sys.argv[1], json.loads(sys.argv[2])
found = [work(*job[:4], f"{place}/{number}", **job[4]) for number, job in enumerate(jobs)]
with Ranks() as ranks:  # as on GPUs: each rank merges its own share first
    ranks.ordered = False
    found.append(work(*jobs[0][:4], None, engine=ranks))
    outcomes = []
    for task in ranks.map(abs, range(-3, 0)), ranks.map(lambda x: 1 // x, [1, 0]):
        try:
            outcomes.append(list(task))
        except ZeroDivisionError as error:
            outcomes.append(repr(error))
with open(f"{place}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump([found, outcomes], file)
"""
)
KILLED = (
    SHARED
    + """
model, output, resume = sys.argv[1:]
said = lambda name, done, total: print(name, done, flush=True) if os.environ["RANK"] == "0" else None
work(model, "gptq", {}, 3, output, resume=resume == "True", progress=said)
"""
)
SETTINGS = {"weights": "int4:g16", "activations": "int4:minmax"}


@contextmanager
def one_thread() -> Iterator[None]:
    """As many as torchrun gives a rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, str]:
    """The dither of this test, and one thread."""
    paths = [str(Path(dither.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1"}


def started(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A program that has ended."""
    return subprocess.run(command, check=False, env=environment(), capture_output=True, text=True, timeout=200)


def in_this_process(*job: Any, **options: Any) -> tuple[str, Any]:
    """The same job without ranks."""
    namespace: dict[str, Any] = {}
    exec(compile(SHARED, "shared", "exec"), namespace)
    with one_thread():
        return namespace["work"](*job, **options)  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, str]:
    """What a result holds, without the report, which has times in it."""
    found = {path.name: path for path in folder.iterdir() if not path.name.startswith("report")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_process(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("LlamaForCausalLM").model.save_pretrained(tmp_path / "llama", max_shard_size="30KB")
    tiny("ViTForImageClassification").model.save_pretrained(tmp_path / "vit")
    llama, vit = str(tmp_path / "llama"), str(tmp_path / "vit")
    jobs: list[list[Any]] = [
        [llama, "gptq", SETTINGS, 5, {}],
        [llama, "gptq", SETTINGS, 5, {"stream": True}],
        [llama, "awq", {"weights": "int4:g16", "judge": "block"}, 3, {}],
        [llama, "adadim", {"weights": "int4:g16"}, 3, {}],
        [llama, "gwq", {"weights": "int4:g16"}, 2, {}],
        [vit, "erq", {"weights": "int4", "activations": "int4"}, 3, {}],
        [vit, "repq", {"weights": "int4", "activations": "int4"}, 1, {}],  # more ranks than batches
    ]
    (tmp_path / "ranks").mkdir()
    (tmp_path / "jobs.py").write_text(JOBS)
    command = [*TORCHRUN, tmp_path / "jobs.py", tmp_path / "ranks", json.dumps(jobs)]
    done = started([str(part) for part in command])
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / "ranks" / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # the ranks agree to the bit, also where they merge their shares first
    for number, (model, method, fields, count, options) in enumerate(jobs):
        alone = in_this_process(model, method, fields, count, tmp_path / f"alone{number}", **options)
        assert list(alone) == first[0][number], (model, method)
        assert files(tmp_path / f"alone{number}") == files(tmp_path / "ranks" / str(number)), (model, method)
    assert first[1][0] == [3, 2, 1] and first[1][1].startswith("ZeroDivisionError")


@pytest.mark.slow
def test_ranks_that_were_killed_go_on_with_the_same_bytes(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("LlamaForCausalLM", num_hidden_layers=6).model.save_pretrained(tmp_path / "llama")
    (tmp_path / "killed.py").write_text(KILLED)
    command = [*TORCHRUN, str(tmp_path / "killed.py"), str(tmp_path / "llama"), str(tmp_path / "out")]
    with subprocess.Popen([*command, "False"], env=environment(), stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        said = [agent.stdout.readline() for _ in range(3)]
        for process in [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]:
            process.send_signal(signal.SIGKILL)
    assert said[2] == "model.layers.2 3\n"
    kept = {path.stem for path in (tmp_path / "out" / "unfinished").glob("*.json")} - {"fingerprint"}
    assert {"model.layers.0", "model.layers.1", "model.layers.2"} <= kept < {f"model.layers.{n}" for n in range(6)}
    done = started([*command, "True"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[len(kept)] == f"model.layers.{len(kept)} {len(kept) + 1}"
    in_this_process(str(tmp_path / "llama"), "gptq", {}, 3, tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_tasks_are_dealt_so_that_nobody_has_much_more_than_another() -> None:
    assert dealt([1.0, 1.0, 1.0, 1.0], 2) == [0, 1, 0, 1]
    costs = [4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 14.0]  # a block of Llama: down is three times as wide
    owners = dealt(costs, 2)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == hand) for hand in (0, 1)]
    assert sorted(loads) == [16, 22] or sorted(loads) == [18, 20]
    assert dealt([], 3) == []
    assert set(dealt([1.0] * 5, 8)) == {0, 1, 2, 3, 4}


def test_what_does_not_fit_torchrun_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="torchrun did not start this process"), opened("torchrun"):
        pass
    with pytest.raises(InputError, match="choose one of auto, local, torchrun, ray"), opened("spark"):
        pass
    with pytest.raises(InputError, match="needs --engine ray"), opened("local", ray_address="auto"):
        pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="every rank would do all the work"), opened("local"):
        pass
    with pytest.raises(InputError, match="instead of --workers"), opened("auto", workers=2):
        pass
    with pytest.raises(InputError, match="each has a GPU of its own"):
        own_device("cuda:1")
    assert isinstance(team_of(Ranks("cpu")), Ranks)


def test_a_method_that_needs_all_samples_is_refused_before_any_work(tiny: Callable[..., Any]) -> None:
    class Pair(Alone):
        size = 2

    model, batch = tiny().model, tiny().batch(2)
    with pytest.raises(InputError, match="signround: it needs samples of all calibration batches"):
        begin(model, "signround", [batch], None, 0, 2, None, None, False, None, Pair())
    assert open_network(model).model is model
