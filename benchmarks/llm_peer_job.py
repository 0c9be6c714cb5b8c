"""One quantization by another tool, inside an environment that holds it; started by llm_peers.py, needs no dither.

    python llm_peer_job.py JOB.json

The job names the peer, the model's folder, a file of calibration windows and where dequantized weights (unless null)
and facts go. Cost is counted from the model in memory on, or with `reading` from its folder on.
All linear layers of the blocks are quantized, weights only; embeddings and the head stay. `bits_per_weight` is what
codes, scales (16 bits unless the tool stores others) and zero-points take, as if packed without gaps.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from process_cost import Cost
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
Quantized = tuple[Callable[[], Weights], float]  # what dequantizes the result, once its cost is measured; its bits
PACKAGES = {"hqq": "hqq", "bitsandbytes": "bitsandbytes", "llmcompressor": "llmcompressor", "autoround": "auto-round"}


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that every tool quantizes, by name: linear ones inside the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def quantize_hqq(model: nn.Module, windows: Tensor, job: dict[str, Any]) -> Quantized:
    """Half-quadratic quantization; scale and zero of each group are rounded to float16, as they are stored."""
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    config = BaseQuantizeConfig(nbits=job["bits"], group_size=job["group_size"], axis=job["options"].get("axis", 1))
    stored = {}
    for name, layer in linears(model):
        dense = layer.weight.data
        layer.weight.data = torch.empty(0)  # as a layer that is replaced
        codes, meta = Quantizer.quantize(
            dense, device=job["device"], compute_dtype=torch.float32, **config["weight_quant_params"]
        )
        meta |= {key: meta[key].half().float() for key in ("scale", "zero")} | {"compute_dtype": torch.float32}
        stored[name] = (codes, meta)
    bits = job["bits"] + 32 / job["group_size"]
    return lambda: {name: Quantizer.dequantize(*one) for name, one in stored.items()}, bits


def quantize_bitsandbytes(model: nn.Module, windows: Tensor, job: dict[str, Any]) -> Quantized:
    """nf4 of QLoRA; `nested` quantizes the float32 absolute maxima themselves."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    nested, stored, nbytes, count = job["options"].get("nested", False), {}, 0, 0
    for name, layer in linears(model):
        dense = layer.weight.data
        layer.weight.data = torch.empty(0)  # as a layer that is replaced
        codes, state = quantize_4bit(dense, blocksize=job["group_size"], quant_type="nf4", compress_statistics=nested)
        stored[name] = (codes, state)
        nbytes += codes.nbytes + state.absmax.nbytes + state.code.nbytes
        nbytes += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes if nested else 0
        count += dense.numel()
    return lambda: {name: dequantize_4bit(*one) for name, one in stored.items()}, 8 * nbytes / count


def quantize_llmcompressor(model: nn.Module, windows: Tensor, job: dict[str, Any]) -> Quantized:
    """GPTQ as llm-compressor runs it by default; `symmetric` is its usual choice."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    symmetric = job["options"].get("symmetric", True)
    form = QuantizationArgs(
        num_bits=job["bits"], type="int", strategy="group", group_size=job["group_size"], symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=form)
    rows = windows.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )

    def dense(layer: Any) -> Tensor:
        zero, args = getattr(layer, "weight_zero_point", None), layer.quantization_scheme.weights
        return fake_quantize(layer.weight.data.float(), layer.weight_scale.half().float(), zero, args)

    bits = job["bits"] + (16 + (0 if symmetric else job["bits"])) / job["group_size"]
    return lambda: {name: dense(layer) for name, layer in linears(model)}, bits


def quantize_autoround(model: nn.Module, windows: Tensor, job: dict[str, Any]) -> Quantized:
    """Signed gradient descent on rounding and clipping; its GPTQ format stores a zero-point even where symmetric."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tuner = AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["options"].get("symmetric", True),
        iters=job["options"].get("iters", 200),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows],
        seed=job["seed"],
        device_map=job["device"],
    )
    tuned, _ = tuner.quantize()
    bits = job["bits"] + (16 + job["bits"]) / job["group_size"]
    return lambda: {name: layer.weight.data.float() for name, layer in linears(tuned)}, bits


PEERS: dict[str, Callable[[nn.Module, Tensor, dict[str, Any]], Quantized]] = {
    "hqq": quantize_hqq,
    "bitsandbytes": quantize_bitsandbytes,
    "llmcompressor": quantize_llmcompressor,
    "autoround": quantize_autoround,
}


def read(folder: str) -> nn.Module:
    """The model in float32."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def warm_up(model: nn.Module, windows: Tensor) -> None:
    """Run the model once, so that what it brings along is in memory."""
    with torch.no_grad():
        model(input_ids=windows[:1, :32], use_cache=False)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(job["threads"])
    if job["peer"] == "autoround":
        import auto_round  # noqa: F401  libraries are loaded before memory is first read
    if job["peer"] == "llmcompressor":
        import llmcompressor  # noqa: F401
    windows, cuda = load_file(job["windows"])["windows"], job["device"] != "cpu"
    if job.get("reading", False):  # what it costs from the folder on; libraries are loaded before
        warm_up(read(job["model"]), windows)
        cost, model = Cost(), read(job["model"])
    else:
        model = read(job["model"])
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # in memory, not mapped from the file
    if cuda and job["peer"] in ("hqq", "bitsandbytes"):  # the others move what they work on
        model.to(job["device"])
    if not job.get("reading", False):
        cost = Cost()
    dequantize, bits = PEERS[job["peer"]](model, windows, job)
    facts = cost.facts() | {"device": torch.cuda.get_device_name() if cuda else f"{job['threads']} CPU threads"}
    facts |= {"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {}
    facts |= {
        "bits_per_weight": bits,
        "version": importlib.metadata.version(PACKAGES[job["peer"]]),
        "torch": torch.__version__,
    }
    with torch.no_grad():
        if job["weights"] is not None:
            dense = {name: weight.float().contiguous().cpu() for name, weight in dequantize().items()}
            save_file(dense, job["weights"])
    Path(job["facts"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
