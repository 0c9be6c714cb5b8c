"""The plan of a run before hours are spent: what is stored how, how large, how much memory, and what cannot work."""

from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dither.errors import ShapeError, SpecError
from dither.formats.layout import Layout
from dither.formats.spec import QuantSpec
from dither.methods.base import Method
from dither.models.anatomy import Anatomy
from dither.models.layers import has_gram, is_layer

SPILL_BUDGET = 2**30  # bytes of activations that stay in memory, unless the caller says otherwise
_PASSES = 20  # measured on ViTs: links, ranges, searches, Grams and errors cost this many forward passes
_COLUMN_S = 4e-4  # measured: what a column costs a solver that goes column by column, apart from arithmetic
_COPIES = 8  # measured: what a block's inputs take while ranges are searched and Grams summed in float64


def check_formats(model: nn.Module, anatomy: Anatomy, method: Method) -> None:
    """Refuse formats that cannot hold a layer, before anything runs.

    Raises:
        SpecError: a weight format that is no weight format.
        ShapeError: a group size that does not divide; the message names the layer.
    """
    for name in anatomy.layers:
        spec = method.weight_spec(name)
        if spec.kind not in method.kinds or spec.dynamic:
            raise SpecError(_refusal(name, spec, method))
        inputs = method.entry_activations if name == anatomy.entry else method.activations
        if inputs is not None and inputs.granularity == "token" and isinstance(model.get_submodule(name), nn.Conv2d):
            raise SpecError(f"{name}: a convolution has no tokens; write int{inputs.bits}:tensor, or skip it")
        try:
            Layout(spec, _matrix_shape(model, name)).tensors()
        except ShapeError as error:
            raise ShapeError(f"{name}: {error}") from None
    for field in ("activations", "attention", "probabilities", "entry_activations"):
        spec = getattr(method, field)
        if isinstance(spec, QuantSpec) and spec.granularity in ("group", "channel"):
            raise SpecError(
                f"{field} {spec}: activations have one range a tensor or a token; write int{spec.bits}:tensor"
            )


def _refusal(name: str, spec: QuantSpec, method: Method) -> str:
    if spec.kind == "nuq":
        return f"{name}: {spec} needs a method that fits a codebook, such as squeezellm; {method.name} does not"
    known = [kind for kind in ("int", "mxint", "nf", "fp", "nuq") if kind in method.kinds]
    least = {"nf": "nf4", "fp": "fp4"}.get(known[0], f"{known[0]}{spec.bits}") if known else "another method"
    wanted = "static uniform" if set(known) <= {"int", "mxint"} else f"static ({', '.join(known)})"
    return f"{name}: weights of {method.name} need a {wanted} format, got {spec}; try {least}"


def _matrix_shape(model: nn.Module, name: str) -> tuple[int, int]:
    layer = model.get_submodule(name)
    if not is_layer(layer):
        raise SpecError(f"{name} is a {type(layer).__name__}, not a layer")
    return layer.weight.shape[0], layer.weight[0].numel()


def make_plan(model: nn.Module, anatomy: Anatomy, method: Method, run: Any, batches: Any) -> dict[str, Any]:
    """Layers with their formats and exact stored bytes, totals, and estimates of memory and time.

    The sizes are exact. The time is for a method that solves with Grams; the memory is beside Python's and torch's own.
    """
    check_formats(model, anatomy, method)
    rows = [_plan_layer(model, name, method) for name in anatomy.layers]
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    kept -= sum(model.get_parameter(f"{row['name']}.weight").nbytes for row in rows)
    gram = max((3 * 8 * (row["shape"][1] + 1) ** 2 for row in rows if row["gram"]), default=0)
    seconds, activations, working = _measure(model, anatomy, run, batches[0])
    original = sum(p.numel() * p.element_size() for p in model.parameters())
    size = kept + sum(row["nbytes"] for row in rows)
    largest = max((_bytes(model.get_submodule(unit.name)) for unit in anatomy.units), default=0)
    return {
        "schema": 1,
        "kind": "plan",
        "method": method.name,
        "units": len(anatomy.units),
        "layers": rows,
        "kept": dict(anatomy.kept),
        "size_bytes": size,
        "original_bytes": original,
        "gram_bytes": gram,
        "memory_bytes": original
        + 2 * largest
        + gram
        + _COPIES * working
        + min(activations * len(batches), SPILL_BUDGET),
        "disk_bytes": 2 * size,  # finished units wait beside the result until it is whole
        "estimated_time_s": _PASSES * seconds * len(batches) + _solve_seconds(rows),
    }


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _measure(model: nn.Module, anatomy: Anatomy, run: Any, batch: Any) -> tuple[float, int, int]:
    """Seconds of a forward pass; bytes of the largest unit's inputs and outputs; bytes of all inputs inside a unit."""
    between, inside = dict.fromkeys((unit.name for unit in anatomy.units), 0), Counter[str]()

    def keep(unit: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            parts = [*args, *(output if isinstance(output, tuple) else (output,))]
            between[unit] = sum(x.nbytes for x in parts if isinstance(x, torch.Tensor))

        return hook

    def count(unit: str) -> Callable[..., None]:
        return lambda _module, args: inside.update({unit: args[0].nbytes})

    handles = [model.get_submodule(unit.name).register_forward_hook(keep(unit.name)) for unit in anatomy.units]
    for unit in anatomy.units:
        handles += [model.get_submodule(name).register_forward_pre_hook(count(unit.name)) for name in unit.layers]
    start = perf_counter()
    try:
        with torch.no_grad():
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return perf_counter() - start, max(between.values(), default=0), max(inside.values(), default=0)


def _plan_layer(model: nn.Module, name: str, method: Method) -> dict[str, Any]:
    shape, spec, layer = _matrix_shape(model, name), method.weight_spec(name), model.get_submodule(name)
    gram = is_layer(layer) and has_gram(layer)
    return {
        "name": name,
        "shape": list(shape),
        "weights": str(spec),
        "nbytes": Layout(spec, shape).nbytes,
        "gram": gram,
    }


def _solve_seconds(rows: list[dict[str, Any]]) -> float:
    """Three factorizations a layer at the measured rate of a float64 product, and a step for each column."""
    probe = torch.ones(512, 512, dtype=torch.float64)
    start = perf_counter()
    for _ in range(4):
        probe @ probe
    rate = 4 * 2 * 512**3 / max(perf_counter() - start, 1e-6)
    work = sum(row["shape"][1] ** 3 + 2 * row["shape"][0] * row["shape"][1] ** 2 for row in rows if row["gram"])
    columns = sum(row["shape"][1] for row in rows if row["gram"])
    return float(3 * work / rate + _COLUMN_S * columns)
