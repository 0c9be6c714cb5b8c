"""compare: several methods on one model, several calibration draws each, one table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither.data import ImageSet, open_images
from dither.errors import DitherError, InputError
from dither.evaluation import top1
from dither.evaluation.evaluate import BATCH, evaluate, ids, logits, select
from dither.methods import Method
from dither.models.network import open_network
from dither.pipeline import Report, quantize
from dither.recipe import parse_method

Progress = Callable[[str, int, int], None]  # (run, runs done, runs in all)


def compare(
    model: str | Path | nn.Module,
    methods: Sequence[str | Method],
    calibration: str | Path | ImageSet,
    data: str | Path | ImageSet,
    *,
    weights: Sequence[str] = (),
    activations: Sequence[str] = (),
    seeds: int = 1,
    count: int | None = None,
    evaluate_count: int | None = None,
    batch_size: int = BATCH,
    device: str | torch.device | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Quantize the model with every method, format and seed, and evaluate each result on `data`.

    A method is a name, a text such as `gptq+reparameterize=true`, or a configured Method, for which `weights` and
    `activations` are not applied. A run that fails is reported as a failure; the others go on.

    Raises:
        InputError: calibration and evaluation pictures overlap, or a method or format is unknown.
    """
    jobs = _jobs(methods, weights, activations)
    network = open_network(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pictures, source = select(data, evaluate_count), _open(calibration)
    refuse_overlap(source, pictures)
    reference = logits(network, pictures, batch_size)
    classes = ids(network, pictures)
    runs: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    total = len(jobs) * seeds
    for done, (seed, (label, method)) in enumerate((s, job) for s in range(seeds) for job in jobs):
        if progress is not None:
            progress(f"{label} seed {seed}", done, total)
        try:
            result = quantize(network.model, method, source, count=count, seed=seed, workers=workers)
            found = evaluate(result.network, pictures, reference=reference, batch_size=batch_size)
        except DitherError as error:
            failures.append({"method": label, "seed": seed, "error": str(error)})
            continue
        facts = facts or {**result.report.data["provenance"], "seed": f"0 to {seeds - 1}"}
        runs.append(_run(label, method, seed, result.report.data, found.to_json()))
    if progress is not None:
        progress("done", total, total)
    return Report(
        {
            "schema": 1,
            "kind": "compare",
            "model": {
                "name": network.name,
                "class": type(network.model).__name__,
                "parameters": sum(p.numel() for p in network.model.parameters()),
                "source": network.name,
            },
            "provenance": facts,
            "reference": {
                "top1": None if classes is None else top1(reference, classes),
                "size_bytes": sum(p.numel() * p.element_size() for p in network.model.parameters()),
                "bits_per_weight": 8 * next(network.model.parameters()).element_size(),
            },
            "runs": runs,
            "failures": failures,
            "evaluation": {"count": len(pictures), "source": pictures.source},
        }
    )


def _jobs(
    methods: Sequence[str | Method], weights: Sequence[str], activations: Sequence[str]
) -> list[tuple[str, Method]]:
    jobs: list[tuple[str, Method]] = []
    for method in methods:
        if isinstance(method, Method):
            jobs.append((method.name, method))
            continue
        for weight in weights or (None,):
            for activation in activations or (None,):
                given = {"weights": weight, "activations": activation}
                fields = {key: text for key, text in given.items() if text is not None}
                jobs.append((method, parse_method(method, fields)))
    if not jobs:
        raise InputError("compare needs at least one method")
    return jobs


def _open(calibration: str | Path | ImageSet) -> ImageSet:
    return calibration if isinstance(calibration, ImageSet) else open_images(calibration)


def refuse_overlap(calibration: ImageSet, pictures: ImageSet) -> None:
    """Evaluating on what a method was calibrated on flatters it.

    Raises:
        InputError: a picture is in both sets.
    """
    shared = calibration.digests() & pictures.digests()
    if shared:
        raise InputError(
            f"{len(shared)} pictures are in both calibration {calibration.source!r} and evaluation {pictures.source!r}; "
            "give two sets that do not overlap"
        )


def _run(label: str, method: Method, seed: int, report: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    totals = report["totals"]
    return {
        "method": method.name,
        "label": label,
        "seed": seed,
        "weights": str(method.weights),
        "activations": "none" if method.activations is None else str(method.activations),
        "bits_per_weight": totals["bits_per_weight"],
        "size_bytes": totals["size_bytes"],
        "top1": found["top1"],
        "agreement": found["agreement"],
        "kl": found["kl"],
        "sqnr_db": found["sqnr_db"],
        "time_s": totals["time_s"],
        "layers": [{"name": row["name"], "output_error": row["output_error"]} for row in report["layers"]],
    }
