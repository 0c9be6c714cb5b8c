"""Language models of real classes: every matrix of their blocks is quantized, and what is kept is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.errors import SpecError
from dither.inspection import inspect
from dither.models.layers import is_layer, matrix_shape, set_weight_matrix, weight_matrix
from dither.nn.linear import QuantizedLinear
from dither.storage import write_network

HIGH = {"weights": "int8:asym:minmax", "activations": None}
# class → matrices that are quantized: all of two blocks, those of four experts one by one
MATRICES = {
    "OPTForCausalLM": 2 * 6,
    "LlamaForCausalLM": 2 * 7,
    "Qwen2ForCausalLM": 2 * 7,
    "Qwen3ForCausalLM": 2 * 7,
    "GPT2LMHeadModel": 2 * 4,
    "GPTNeoXForCausalLM": 2 * 4,
    "MixtralForCausalLM": 2 * (4 + 4 * 2),
    "Qwen2MoeForCausalLM": 2 * (4 + 4 * 2 + 4),
    "GptOssForCausalLM": 2 * (4 + 4 * 2),
}
TIED = ("OPTForCausalLM", "GPT2LMHeadModel")
pytestmark = pytest.mark.filterwarnings("ignore:.*grouped_mm.*")


def kept(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["name"]: row["reason"] for row in rows if row["status"] == "kept"}


@pytest.mark.parametrize("name", MATRICES)
def test_every_matrix_is_quantized_or_kept_for_a_reason(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    result = dither.quantize(network.model, dither.RTN(**HIGH), [network.batch(2), network.batch(2, seed=1)])
    rows = result.report.data["coverage"]
    assert sum(isinstance(module, QuantizedLinear) for module in result.model.modules()) == MATRICES[name]
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in network.model.parameters())
    reasons = kept(rows)
    assert all(reasons.values())
    (head,) = {name for name, module in result.model.named_modules() if is_layer(module)}
    assert ("its weight is that of" if name in TIED else "head over the vocabulary") in reasons[head]
    true, found = network.logits(network.batch(3)), network.logits(network.batch(3), result.model)
    assert float((found - true).norm() / true.norm()) < 0.03  # measured at most 0.014


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM"])
def test_a_quantized_model_is_loaded_again_as_it_was(tiny: Callable[..., Any], tmp_path: Path, name: str) -> None:
    network = tiny(name)
    method = dither.RTN(weights="nf4:g8", skip=["*.1.mlp.experts.*.2"] if "2" not in name and "Oss" not in name else [])
    result = dither.quantize(network.model, method, [network.batch(2)])
    write_network(result.network, tmp_path / "out")
    again = dither.load(tmp_path / "out")
    assert torch.equal(network.logits(network.batch(2), again), network.logits(network.batch(2), result.model))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM"])
def test_every_matrix_has_a_gram_of_its_own_inputs(tiny: Callable[..., Any], name: str) -> None:
    network = tiny(name)
    batches, errors = [network.batch(8, seed=seed) for seed in range(3)], {}
    for method in ("rtn", "gptq"):
        recipe = dither.METHODS[method](weights="int3:asym:minmax")
        rows = dither.quantize(network.model, recipe, batches).report.data["layers"]
        errors[method] = {row["name"]: row["output_error"] for row in rows}
    halved = [errors["gptq"][name] < 0.65 * error for name, error in errors["rtn"].items()]
    assert all(halved), errors  # measured: 0.15 to 0.55 of what rounding to nearest leaves


def test_a_tied_head_is_kept_unless_it_is_asked_for_by_name(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    result = dither.quantize(network.model, dither.RTN(**HIGH), [network.batch(2)])
    head = next(row for row in result.report.data["coverage"] if row["name"] == "lm_head")
    assert head["status"] == "kept" and head["parameters"] == 0
    assert head["reason"].startswith("its weight is that of model.embed_tokens")
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    asked = dither.RTN(**HIGH, overrides={"lm_head": "int8"})
    result = dither.quantize(network.model, asked, [network.batch(2)])
    assert isinstance(result.model.lm_head, QuantizedLinear)


def test_a_transposed_matrix_is_seen_as_one_that_multiplies_rows() -> None:
    from transformers.pytorch_utils import Conv1D

    conv, x = Conv1D(5, 3).requires_grad_(False), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert is_layer(conv) and matrix_shape(conv) == (5, 3)
    torch.testing.assert_close(nn.functional.linear(x, weight_matrix(conv, "conv"), conv.bias), conv(x))
    set_weight_matrix(conv, 2 * weight_matrix(conv, "conv"), torch.ones(5))
    torch.testing.assert_close(nn.functional.linear(x, weight_matrix(conv, "conv"), torch.ones(5)), conv(x))

    class Own(Conv1D):
        """Computes in its own way."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert not is_layer(Own(5, 3))


class ByName(nn.Module):
    """A block that calls its layers with named arguments, as some models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(input=nn.functional.gelu(self.up(input=self.norm(x))))


def test_layers_may_be_called_with_named_arguments() -> None:
    model = nn.Sequential(ByName(8), ByName(8)).requires_grad_(False)
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    method = dither.METHODS["erq"](weights="int8:asym", activations="int8", reparameterize=True)
    result = dither.quantize(model, method, x)
    assert [row["name"] for row in result.report.data["layers"]] == ["0.up", "0.down", "1.up", "1.down"]
    remarks = {row["name"]: row["reason"] for row in result.report.data["coverage"]}
    assert remarks["0.norm"] == "reparameterized with 1 layers"
    torch.testing.assert_close(result.model(x), model(x), rtol=0.1, atol=0.1)


def test_an_interrupted_run_over_experts_goes_on_where_it_was(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("MixtralForCausalLM")
    batches, output = [network.batch(2)], tmp_path / "out"

    def interrupt(_what: str, done: int, _of: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dither.quantize(network.model, "gptq", batches, output=output, progress=interrupt)
    resumed = dither.quantize(network.model, "gptq", batches, output=output, resume=True).model.state_dict()
    whole = dither.quantize(network.model, "gptq", batches).model.state_dict()
    assert set(resumed) == set(whole) and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_inspecting_and_planning_name_every_expert(tiny: Callable[..., Any], tmp_path: Path) -> None:
    network = tiny("MixtralForCausalLM")
    network.model.save_pretrained(tmp_path)
    names = [f"model.layers.1.mlp.experts.{part}.{k}" for k in range(4) for part in ("gate_up_proj", "down_proj")]
    layers = {row["name"]: row["shape"] for row in inspect(tmp_path)["layers"]}
    planned = {row["name"]: row["shape"] for row in dither.plan(tmp_path, "rtn", [network.batch(2)])["layers"]}
    assert layers == planned and set(names) < set(layers) and layers[names[1]] == [32, 48]


def test_a_format_that_a_method_cannot_fit_is_refused_before_anything_is_measured(tiny: Callable[..., Any]) -> None:
    network = tiny("LlamaForCausalLM")
    with pytest.raises(
        SpecError, match=r"q_proj: nuq4:channel needs a method that fits a codebook, such as squeezellm"
    ):
        dither.plan(network.model, dither.RTN(weights="nuq4"), [network.batch(2)])
    with pytest.raises(SpecError, match=r"erq stores weights as one of int, mxint, got nf4:g8; try int4"):
        dither.plan(network.model, dither.METHODS["erq"](weights="nf4:g8"), [network.batch(2)])
    with pytest.raises(SpecError, match=r"activations nf4:.*a format of weights; write int4:tensor"):
        dither.plan(network.model, dither.RTN(activations="nf4:tensor"), [network.batch(2)])
