"""transformers' own loading functions open what dither wrote, whichever of the two is imported first."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
from dither.export.registration import TARGET, _Finder, register_when_imported
from dither.storage import write_network

LOAD = "model = AutoModelForImageClassification.from_pretrained(sys.argv[1])"
FROM = "from transformers import AutoModelForImageClassification"
ORDERS = {
    "dither first": f"import sys, importlib.util, dither\nimportlib.util.find_spec({TARGET!r})\n{FROM}\n{LOAD}",
    "transformers first": f"import sys, {TARGET}\nimport dither\n{FROM}\n{LOAD}",
}
SHOW = "\nimport torch\nprint(float(model(torch.ones(1, 3, 16, 16)).logits.sum()))"


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_fresh_process_loads_a_quantized_folder(tiny: Callable[..., Any], tmp_path: Path, order: str) -> None:
    network = tiny(num_hidden_layers=1)
    result = dither.quantize(network.model, "rtn", network.batch(2))
    write_network(result.network, tmp_path / "out")
    command = [sys.executable, "-c", ORDERS[order] + SHOW, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = network.logits(torch.ones(1, 3, 16, 16), result.model).sum()
    assert float(done.stdout) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.slow
def test_importing_dither_does_not_import_transformers_or_torch() -> None:
    code = (
        "import sys, dither; print([name for name in ('transformers', 'torch', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_finder_waits_until_the_module_is_loaded_and_is_never_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(TARGET)
    loaded = sys.modules[TARGET]
    monkeypatch.setattr(sys, "meta_path", [x for x in sys.meta_path if not isinstance(x, _Finder)])
    register_when_imported()  # the module is there: registered at once
    assert not any(isinstance(finder, _Finder) for finder in sys.meta_path)
    monkeypatch.delitem(sys.modules, TARGET)
    for _ in range(2):
        register_when_imported()
    assert sum(isinstance(finder, _Finder) for finder in sys.meta_path) == 1
    spec = importlib.util.find_spec(TARGET)
    assert spec is not None
    assert spec.origin == loaded.__file__
    assert sum(isinstance(finder, _Finder) for finder in sys.meta_path) == 1
    assert importlib.util.find_spec("json") is not None
