"""A study of what quantization does to generated text: formats × temperature × length × top-k.

Every format writes from the same prompts with the same noise; its texts are compared with the full-precision model's,
and judged by that model's likelihood. Shorter texts are the beginnings of longer ones.

Source: S. Roy, Understanding the Impact of Post-Training Quantization on Large Language Models, 2023, arXiv 2309.05210:
formats and knobs. The prompts, the values of the grid and the measures' formulas are not in its abstract [choice].
Departs from it: weights are quantized with dither's own formats; int8 has no full-precision outlier columns unless a
format is given that keeps them; double quantization groups the scales of a column of groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dither.errors import InputError
from dither.evaluation.generation import (
    Generated,
    Sampling,
    agreement,
    common_start,
    continuation_nll,
    distinct,
    encode,
    generate,
    stops,
)
from dither.evaluation.peak import peak_memory
from dither.formats.spec import QuantSpec
from dither.methods.rtn import RTN
from dither.models.network import Network, open_network
from dither.nn.linear import cache_weights
from dither.pipeline import quantize
from dither.result import Report

FULL = "full"
FORMATS = ("nf4:g64", "fp4:g64", "nf4:g64:s8.256", "fp4:g64:s8.256", "int8:channel:sym")
TEMPERATURES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
LENGTHS = (50, 100)
TOP_K = (1, 10, 50, 200)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "The three most important inventions of the last century are",
    "To bake a good loaf of bread, first",
    "In physics, the law of conservation of energy says that",
    "Dear hiring manager, I am writing to",
    "The main difference between a virus and a bacterium is",
    "She opened the letter with trembling hands and read:",
    "A short history of the Roman Empire:",
    "The best way to learn a new language is",
)
SPEED_TOKENS = 32
SAMPLES = 2  # prompts whose texts are kept in the report
Progress = Callable[[str, int, int], None]
Key = tuple[float, int | None, int, int]  # temperature, top-k, prompt, seed


@dataclass(frozen=True)
class Knobs:
    """What is tried: every temperature with every top-k and length; temperature 0 with neither top-k nor seeds."""

    temperatures: tuple[float, ...] = TEMPERATURES
    lengths: tuple[int, ...] = LENGTHS
    top_k: tuple[int, ...] = TOP_K
    seeds: int = 3

    def __post_init__(self) -> None:
        if not self.temperatures or not self.lengths or not self.top_k or self.seeds < 1:
            raise InputError("a study needs at least one temperature, length, top-k and seed")

    def keys(self, prompts: int) -> list[Key]:
        """All texts to write."""
        found: list[Key] = []
        for temperature in self.temperatures:
            for top_k in self.top_k if temperature > 0 else (None,):
                for prompt in range(prompts):
                    found += [
                        (temperature, top_k, prompt, seed) for seed in range(self.seeds if temperature > 0 else 1)
                    ]
        return found


def study_generation(
    model: str | Path,
    formats: Sequence[str] = FORMATS,
    prompts: Sequence[str] = PROMPTS,
    knobs: Knobs | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Report:
    """Run the study on a folder of a language model; `dtype` is what every format computes in.

    Raises:
        InputError: no language model, no tokenizer, a prompt that is too long.
        SpecError: a format that does not exist.
    """
    knobs, started = knobs or Knobs(), perf_counter()
    methods = {text: _method(text) for text in formats}
    network = open_network(model, device, dtype)
    inputs = [encode(network, prompt, max(knobs.lengths)) for prompt in prompts]
    study = _Study(network, inputs, knobs, progress, len(knobs.keys(len(prompts))) * (1 + len(methods)))
    study.measure(FULL, network.model, 8.0 * dtype.itemsize)
    for text, method in methods.items():
        result = quantize(network.model, method, [{"input_ids": inputs[0][None].to(network.device)}])
        study.measure(text, result.model, float(result.report.data["totals"]["bits_per_weight"]))
        del result
    return Report(study.report(prompts, dtype, perf_counter() - started))


def _method(text: str) -> RTN:
    """Rounding to nearest in `WEIGHTS` or `WEIGHTS/ACTIVATIONS`."""
    weights, _, activations = text.partition("/")
    inputs = QuantSpec.parse(activations) if activations else None
    return RTN(
        weights=QuantSpec.parse(weights),
        activations=inputs,
        entry_activations=inputs,
        attention=None,
        probabilities=None,
    )


class _Study:
    """What has been measured so far."""

    def __init__(
        self, network: Network, prompts: list[Int[Tensor, " _"]], knobs: Knobs, progress: Progress | None, count: int
    ) -> None:
        self.network, self.prompts, self.knobs, self.progress, self.count = network, prompts, knobs, progress, count
        self.stop, self.done = stops(network), 0
        self.formats: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.full: dict[Key, tuple[int, ...]] = {}

    def measure(self, name: str, model: nn.Module, bits: float) -> None:
        """Write every text with a model, then its speed and memory with codes as they are stored."""
        cache_weights(model)
        texts = {key: self._write(name, model, key) for key in self.knobs.keys(len(self.prompts))}
        if name == FULL:
            self.full = texts
        judged = {key: self._judge(key, tokens) for key, tokens in texts.items()}
        for temperature in self.knobs.temperatures:
            for top_k in self.knobs.top_k if temperature > 0 else (None,):
                same = [key for key in texts if key[:2] == (temperature, top_k)]
                for length in self.knobs.lengths:
                    row = {"format": name, "temperature": temperature, "top_k": top_k, "new_tokens": length}
                    self.rows.append(row | self._figures({key: texts[key] for key in same}, judged, length))
        self._keep_samples(name, texts)
        cache_weights(model, cached=False)
        self.formats.append({"format": name, "bits_per_weight": bits, **self._cost(model)})

    def _write(self, name: str, model: nn.Module, key: Key) -> tuple[int, ...]:
        temperature, top_k, prompt, seed = key
        sampling = Sampling(max(self.knobs.lengths), temperature, top_k, seed)
        tokens = generate(model, self.prompts[prompt], sampling, self.stop).tokens
        self.done += 1
        if self.progress is not None:
            self.progress(name, self.done, self.count)
        return tokens

    def _judge(self, key: Key, tokens: tuple[int, ...]) -> Float[Tensor, " n"]:
        return continuation_nll(self.network.model, self.prompts[key[2]], tokens)

    def _figures(
        self, texts: Mapping[Key, tuple[int, ...]], judged: Mapping[Key, Float[Tensor, " _"]], length: int
    ) -> dict[str, Any]:
        """Means over the texts of a setting, cut to a length."""
        cut = {key: tokens[:length] for key, tokens in texts.items()}
        nll = torch.cat([judged[key][:length] for key in cut]).double()
        alike = [agreement(tokens, self.full[key][:length]) for key, tokens in cut.items()]
        return {
            "texts": len(cut),
            "tokens": len(nll),
            "agreement": _mean(alike),
            "common_start": _mean([common_start(tokens, self.full[key][:length]) for key, tokens in cut.items()]),
            "perplexity": float(nll.mean().exp()),
            **{f"distinct_{n}": _mean([distinct(tokens, n) for tokens in cut.values()]) for n in (1, 2, 3)},
            "repetition": 1 - _mean([distinct(tokens, 4) for tokens in cut.values()]),
        }

    def _cost(self, model: nn.Module) -> dict[str, Any]:
        """Bytes of the network, and speed and memory while it writes a short text."""
        sampling = Sampling(min(max(self.knobs.lengths), SPEED_TOKENS))
        with peak_memory(self.network.device) as peak:
            made: Generated = generate(model, self.prompts[0], sampling)
        return {
            "size_bytes": sum(x.nbytes for x in model.state_dict().values()),
            "tokens_per_s": made.tokens_per_s,
            "prompt_s": made.times_s[0],
            "peak_bytes": peak.nbytes,
        }

    def _keep_samples(self, name: str, texts: Mapping[Key, tuple[int, ...]]) -> None:
        for key, tokens in texts.items():
            if key[2] < SAMPLES and key[3] == 0 and key[1] in (None, self.knobs.top_k[-1]):
                text = self.network.tokenizer.decode(list(tokens), skip_special_tokens=True)  # type: ignore[union-attr]
                self.samples.append(
                    {"format": name, "temperature": key[0], "top_k": key[1], "prompt": key[2], "text": text}
                )

    def report(self, prompts: Sequence[str], dtype: torch.dtype, time_s: float) -> dict[str, Any]:
        """The report data of kind `study`."""
        from importlib.metadata import version

        model = self.network.model
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "schema": 1,
            "kind": "study",
            "model": {
                "name": self.network.name,
                "class": type(model).__name__,
                "parameters": parameters,
                "source": str(self.network.source),
            },
            "settings": {
                "temperatures": list(self.knobs.temperatures),
                "new_tokens": list(self.knobs.lengths),
                "top_k": list(self.knobs.top_k),
                "seeds": self.knobs.seeds,
                "computed in": str(dtype).removeprefix("torch."),
            },
            "provenance": {
                "dither": version("dither"),
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "device": self.network.device.type,
            },
            "prompts": list(prompts),
            "formats": self.formats,
            "rows": self.rows,
            "samples": self.samples,
            "time_s": time_s,
        }


def _mean(values: Sequence[int | float]) -> float:
    return sum(values) / len(values) if values else float("nan")
