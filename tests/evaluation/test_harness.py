"""The bridge to lm-eval: which figures it returns, what it leaves alone, and what is refused."""

import random
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tests.export.conftest import save_language_model

from dither.errors import DependencyError, InputError
from dither.evaluation.harness import _random_states_kept, open_tasks, run_tasks
from dither.models.network import open_network
from dither.pipeline import quantize

TASK = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["a", "b"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


class Manager:
    """Knows one task."""

    all_tasks = ("letters", "piqa")

    def __init__(self, include_path: str | None = None) -> None:
        self.include_path = include_path

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.all_tasks]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for lm-eval that notes how it is called and returns what `answers` hold."""
    given: dict[str, Any] = {"calls": []}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        given["calls"].append(options)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if "error" in given:
            raise given["error"]
        value = 0.5 + 0.25 * len(given["calls"])
        figures = {"alias": "letters", "acc,none": value, "acc_stderr,none": 0.1, "sample_len": 3}
        figures |= {"f1,strict": 1, "f1_stderr,strict": "N/A"}
        return {"results": {"letters": figures}, "n-samples": {"letters": {"original": 9, "effective": 3}}}

    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    }
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval.tasks"].TaskManager = Manager  # type: ignore[attr-defined]
    modules["lm_eval.models.huggingface"].HFLM = dict  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return given


def test_figures_come_with_their_errors_and_the_reference(harness: dict[str, Any], tmp_path: Path) -> None:
    network = open_network(save_language_model(tmp_path))
    tasks = open_tasks(["letters"], tmp_path, 3)
    assert tasks.manager.include_path == str(tmp_path)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    accuracy, f1 = run_tasks(network, tasks, network)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (accuracy.task, accuracy.metric, accuracy.value, accuracy.stderr) == ("letters", "acc", 0.75, 0.1)
    assert (accuracy.reference, accuracy.count) == (1.0, 3)
    assert (f1.metric, f1.value, f1.stderr) == ("f1 (strict)", 1.0, None)
    options = harness["calls"][0]
    assert options["model"]["pretrained"] is network.model
    assert (options["tasks"], options["limit"]) == (["letters"], 3)


def test_pythons_own_generator_goes_on_as_before() -> None:  # beartype draws from it, so that it is tested by itself
    state = random.getstate()
    with _random_states_kept():
        random.seed(0)
    assert random.getstate() == state


def test_what_cannot_be_run_is_refused(harness: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no task 'pica'.*piqa"):
        open_tasks(["pica"])
    with pytest.raises(InputError, match="'gone' does not exist"):
        open_tasks(["piqa"], "gone")
    harness["error"] = ConnectionError("no hub")
    with pytest.raises(InputError, match="lm-eval cannot run piqa: no hub"):
        run_tasks(open_network(save_language_model(tmp_path)), open_tasks(["piqa"]))


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DependencyError, match=r"dither\[lm-eval\]"):
        open_tasks(["piqa"])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra")
def test_a_task_of_ones_own_runs_offline_on_both_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own").mkdir()
    data = tmp_path / "own" / "letters.jsonl"
    data.write_text("".join(f'{{"question": "the {word}", "answer": {k % 2}}}\n' for k, word in enumerate("abcdef")))
    (tmp_path / "own" / "letters.yaml").write_text(TASK.format(data=data))
    network = open_network(save_language_model(tmp_path / "llama"))
    batch = {"input_ids": torch.arange(16).reshape(2, 8)}
    result = quantize(network.model, "rtn", [batch])
    state = torch.get_rng_state()
    found = run_tasks(result.network, open_tasks(["letters"], tmp_path / "own"), None)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(one.task, one.metric, one.count) for one in found] == [("letters", "acc", 6)]
    assert 0 <= found[0].value <= 1
