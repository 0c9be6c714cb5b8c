"""Scores with the weights that a method's own solver gives: the same as of its run; kept, and the same in workers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.sensitivities.test_sensitivities import FORMATS
from torch.nn import functional

import dither
from dither.engine.local import ProcessPool
from dither.errors import InputError
from dither.methods import METHODS
from dither.methods.base import WEIGHTS
from dither.recipe import build_method
from dither.sensitivities import outputs
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.kl import KL
from dither.sensitivities.solved import Solved
from dither.sensitivity import measure

ALONE = sorted(name for name, kind in METHODS.items() if kind().alone(WEIGHTS) is not None)
LAYERS = ("stem", "blocks.0.qkv", "blocks.0.proj", "blocks.0.fc1", "blocks.0.fc2", "head")
Weights = dict[tuple[str, int], torch.Tensor]


def weights_of(model: Any, batches: Sequence[Any], method: str, options: Sequence[str] = FORMATS) -> Weights:
    """What each layer becomes as each option, as a sensitivity sees it."""
    seen: Weights = {}

    class Watch:
        name: ClassVar[str] = "watch"
        about: ClassVar[str] = "looks at weights"

        def measure(self, probe: Probe) -> Measured:
            probe.solve()
            seen.update({(n, p): probe.stored(n, p) for n in probe.layers for p in range(len(probe.options))})
            return Measured(np.zeros((len(probe.units), len(probe.options))))

    measure(model, Watch(), batches, options=options, method=method)
    return seen


def test_these_methods_solve_layers_by_themselves() -> None:
    assert ALONE == ["billm", "gptq", "hqq", "lorc", "spqr"]
    assert build_method("gptq", {"reparameterize": True}).alone(WEIGHTS) is None


@pytest.mark.parametrize("name", ALONE)
def test_weights_are_those_of_a_run_behind_full_precision_inputs(name: str, odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    batches = [network.batch(4, seed=1), network.batch(4, seed=2)]
    found = weights_of(network.model, batches, name)
    for place, text in enumerate(FORMATS[:2]):
        method = build_method(name, {"weights": text, "inputs": "fp"})
        run = dither.quantize(network.model, method, batches).network.model
        for layer in LAYERS:
            assert torch.equal(found[layer, place], run.get_submodule(layer).packed.qtensor().dequantize()), layer
    assert all(torch.equal(found[layer, 2], network.model.get_submodule(layer).weight) for layer in LAYERS)


def test_grams_are_of_quantized_inputs_where_the_option_quantizes_them(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    batches = [network.batch(8, seed=1)]
    found = weights_of(network.model, batches, "gptq", ["int2:channel", "int2:channel/int2:tensor:asym:percentile"])
    fields = {"weights": "int2:channel", "activations": "int2:tensor:asym:percentile", "inputs": "fp"}
    fields |= {"attention": "none", "probabilities": "none", "entry_activations": "int2:tensor:asym:percentile"}
    run = dither.quantize(network.model, build_method("gptq", fields), batches).network.model
    assert torch.equal(found["blocks.0.fc2", 1], run.blocks[0].fc2.packed.qtensor().dequantize())
    assert not torch.equal(found["blocks.0.fc2", 1], found["blocks.0.fc2", 0])


def test_kl_under_gptq_is_the_divergence_with_its_weights(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    batches = [network.batch(4, seed=1), network.batch(4, seed=2)]
    table = measure(network.model, "kl", batches, options=FORMATS, method="gptq")
    weight = weights_of(network.model, batches, "gptq")["blocks.0.fc1", 0]
    with torch.no_grad():
        before = torch.cat([network.model(batch) for batch in batches]).log_softmax(-1)
        network.model.blocks[0].fc1.weight.copy_(weight)
        after = torch.cat([network.model(batch) for batch in batches]).log_softmax(-1)
    rows = functional.kl_div(after, before, log_target=True, reduction="none").sum(-1)
    assert table.scores[3, 0] == pytest.approx(float(rows.mean()), rel=1e-4)
    assert table.facts["solver"]["method"] == "gptq"


@pytest.mark.parametrize("name", ["kl", "fisher", "quadratic", "hawq-v2+probes=2", "error", "augmented"])
def test_what_looks_at_weights_scores_the_solver_s_and_what_does_not_stays(name: str, odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    batches = [network.batch(6, seed=1)]
    near, solved = (measure(network.model, name, batches, options=FORMATS, method=m).scores for m in ("rtn", "gptq"))
    assert (near[:, 0] != solved[:, 0]).all()
    near, solved = (measure(network.model, "pmpq", batches, options=FORMATS, method=m).scores for m in ("rtn", "gptq"))
    np.testing.assert_array_equal(near, solved)


def test_a_method_that_needs_more_than_a_layer_is_scored_by_the_nearest_codes(odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    batches = [network.batch(6, seed=1)]
    near, other = (measure(network.model, "kl", batches, options=FORMATS, method=m) for m in ("rtn", "awq"))
    np.testing.assert_array_equal(near.scores, other.scores)
    assert "solver" not in other.facts


def test_tables_of_two_methods_are_kept_apart_and_read_again(odd: Callable[..., Any], tmp_path: Path) -> None:
    network = odd(depth=1)
    batches = [network.batch(4)]
    how: dict[str, Any] = {"options": FORMATS, "scores": tmp_path}
    tables = {m: measure(network.model, "kl", batches, method=m, **how) for m in ("rtn", "gptq", "gptq+damping=0.5")}
    assert len(list(tmp_path.glob("kl-*/table.json"))) == 3
    assert not list(tmp_path.glob("kl-*/parts"))
    again = measure(network.model, "kl", batches, method="gptq", **how)
    assert again.facts["time_s"] == tables["gptq"].facts["time_s"]


class Broken(KL):
    """Fails at the fourth unit, when all weights have been solved."""

    def _unit(self, probe: Probe, quantizers: Any, reference: Any, number: int) -> list[tuple[float, float]]:
        if number == 3:
            raise KeyboardInterrupt
        return super()._unit(probe, quantizers, reference, number)


def test_an_interrupted_measurement_does_not_solve_again(
    odd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = odd(depth=1)
    batches = [network.batch(4)]
    how: dict[str, Any] = {"options": FORMATS, "method": "gptq"}
    whole = measure(network.model, "kl", batches, **how)
    with pytest.raises(KeyboardInterrupt):
        measure(network.model, Broken(), batches, scores=tmp_path, **how)
    assert len(list(tmp_path.glob("*/parts/weights/*.safetensors"))) == len(LAYERS)
    monkeypatch.setattr(Solved, "write", lambda *_: pytest.fail("solved again"))
    again = measure(network.model, "kl", batches, scores=tmp_path, **how)
    np.testing.assert_array_equal(whole.scores, again.scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "fisher", "error"])
def test_workers_score_the_same_weights(name: str, odd: Callable[..., Any]) -> None:
    network = odd(depth=1)
    batches = [network.batch(4, seed=1), network.batch(4, seed=2)]
    one = measure(network.model, name, batches, options=FORMATS, method="gptq")
    with ProcessPool(2) as pool:
        two = measure(network.model, name, batches, options=FORMATS, method="gptq", engine=pool)
    np.testing.assert_array_equal(one.scores, two.scores)


def test_codes_that_are_not_there_are_missed_by_name(tmp_path: Path) -> None:
    solved = Solved(build_method("gptq", {}), tmp_path)
    with pytest.raises(InputError, match=r"holds no codes of blocks\.0\.fc1"):
        solved.read("blocks.0.fc1", 0, torch.device("cpu"))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["fisher", "quadratic"])
def test_codes_for_which_there_is_no_room_are_made_or_read_again(
    name: str, method: str, odd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = odd(depth=1)
    batches = [network.batch(4, seed=1), network.batch(4, seed=2)]
    whole = measure(network.model, name, batches, options=FORMATS, method=method)
    asked: list[str] = []
    codes = Probe.codes

    def counted(self: Probe, layer: str, place: int) -> Any:
        asked.append(layer)
        return codes(self, layer, place)

    monkeypatch.setattr(Probe, "codes", counted)
    monkeypatch.setattr(outputs, "HELD", 400)
    little = measure(network.model, name, batches, options=FORMATS, method=method)
    np.testing.assert_array_equal(whole.scores, little.scores)
    assert len(asked) > len(set(asked)) * 2


def test_a_streamed_model_has_the_errors_of_one_in_memory(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("LlamaForCausalLM")
    network.model.save_pretrained(tmp_path / "llama")
    batches = [network.batch(2)]
    how: dict[str, Any] = {"options": ["int2:channel", "int4:channel"], "method": "gptq"}
    whole, streamed = (measure(tmp_path / "llama", "error", batches, stream=s, **how) for s in (False, True))
    np.testing.assert_array_equal(whole.scores, streamed.scores)
    with pytest.raises(InputError, match="kl"):
        measure(tmp_path / "llama", "kl", batches, stream=True, **how)
