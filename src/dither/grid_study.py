"""A study of weights, activations and both on one language model: methods × weight formats × activation formats.

Source: Yao et al., ZeroQuant-V2, 2023, arXiv 2303.08302: weights, activations, or both quantized, by rounding to
nearest and by GPTQ, in rows and in groups; activations of linear layers only, a scale for each token.
Departs from it: one model and one text; the formats are the caller's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dither.comparison import Progress, open_bench, run_jobs
from dither.data import DataSet, open_data
from dither.distilled import DISTILLED
from dither.engine.local import Engine
from dither.evaluation.exam import BATCH
from dither.formats.spec import Kind
from dither.methods.base import Method
from dither.nn.activation import ActivationQuantizer
from dither.provenance import model_sha256, software
from dither.recipe import parse_method, resolved
from dither.result import Report
from dither.tuning.journal import Journal
from dither.walk import Block, LayerRecord

METHODS = ("rtn", "gptq")
WEIGHTS = ("int8:channel", "int4:channel", "int4:g128", "int4:g64", "int4:g32")
ACTIVATIONS = ("none", "int8:token:sym", "int8:token:asym")
FILE = "rows.jsonl"


class InputsOnly(Method):
    """Inputs of layers are quantized, weights are not; the network is for measuring, it cannot be saved."""

    name: ClassVar[str] = "none"
    kinds: ClassVar[tuple[Kind, ...]] = ("int",)

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Put a quantizer before every layer."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            for task in tasks:
                layer, quantizer = block.module.get_submodule(block.local(task.name)), quantizers[task.name]
                layer.register_forward_pre_hook(_before(quantizer))
                rows, columns = task.weight.shape
                block.records.append(
                    LayerRecord(
                        task.name, type(layer).__name__, (rows, columns), "none", str(quantizer.spec),
                        8.0 * task.weight.element_size(), task.weight.nbytes, None, 0.0, 0.0,
                    )
                )  # fmt: skip


def _before(quantizer: ActivationQuantizer) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return quantizer(args[0]), *args[1:]

    return hook


def study_grid(
    model: str | Path,
    methods: Sequence[str] = METHODS,
    calibration: str | Path | DataSet | None = None,
    data: str | Path | DataSet = "",
    *,
    weights: Sequence[str] = WEIGHTS,
    activations: Sequence[str] = ACTIVATIONS,
    seed: int = 0,
    count: int | None = None,
    evaluate_count: int | None = None,
    length: int | None = None,
    device: str | torch.device | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize and judge every combination, and activations alone; the report says the increase of each.

    With `output` every finished row is written at once to `rows.jsonl` there, and `resume` goes on with them.

    Raises:
        InputError: data overlap or do not fit, or there are rows already.
        ResumeError: the rows that are there are of another study.
    """
    jobs = grid_jobs(methods, weights, activations)
    sets = _opened(calibration), _opened(data)
    bench = open_bench(model, sets[0], sets[1] or "", evaluate_count, BATCH, device)
    known = None
    if output is not None:
        fingerprint = {
            "model": model_sha256(bench.network.tensors()),
            "data": [one if one is None or isinstance(one, str) else one.sha256() for one in sets],
            "draw": [seed, count, length, bench.exam.count], "formats": [label for label, _ in jobs],
            "software or device": software(bench.network.device),
        }  # fmt: skip
        known = Rows(Journal(Path(output) / FILE, {"kind": "grid", "fingerprint": fingerprint}, resume), jobs)
    report = run_jobs(bench, jobs, range(seed, seed + 1), count=count, length=length, progress=progress, known=known)
    for run in report.data["runs"]:
        run["weights"] = "none" if run["method"] == InputsOnly.name else run["weights"]
    return Report(report.data | {"grid": {"methods": list(methods), "activations": list(activations)}})


def _opened(data: str | Path | DataSet | None) -> str | DataSet | None:
    """Data as a set, which is known by its content, not by its place; "distilled" and None as they are."""
    if isinstance(data, str | Path):
        return DISTILLED if str(data) == DISTILLED else open_data(data)
    return data


def grid_jobs(methods: Sequence[str], weights: Sequence[str], activations: Sequence[str]) -> list[tuple[str, Method]]:
    """What is run, by label; activations alone first.

    Raises:
        InputError, SpecError: a method or format does not exist.
    """
    jobs: list[tuple[str, Method]] = [
        (f"none / {text}", InputsOnly.model_validate(_inputs(text))) for text in activations if text != "none"
    ]
    for method in methods:
        for weight in weights:
            for text in activations:
                jobs.append((f"{method} {weight} / {text}", parse_method(method, {"weights": weight, **_inputs(text)})))
    return jobs


def _inputs(text: str) -> dict[str, str]:
    """Inputs of layers in a format, attention in full precision."""
    return {"activations": text, "entry_activations": text, "attention": "none", "probabilities": "none"}


class Rows:
    """Finished rows of a study in its journal, by the place of their job."""

    def __init__(self, journal: Journal, jobs: Sequence[tuple[str, Method]]) -> None:
        self.journal, self.recipes = journal, {label: resolved(method) for label, method in jobs}
        self.places = {label: place for place, (label, _) in enumerate(jobs)}

    def find(self, label: str, seed: int) -> dict[str, Any] | None:
        """The row of a job that was run with the same recipe."""
        found = self.journal.records.get(self.places[label])
        same = found is not None and found["recipe"] == json.loads(json.dumps(self.recipes[label]))
        return dict(found["row"]) if found is not None and same else None

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row."""
        label = str(row["label"])
        self.journal.append({"number": self.places[label], "recipe": self.recipes[label], "row": dict(row)})
