"""The plan of a run before hours are spent: what is stored how, how large, how much memory, and what cannot work."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dither.calibrate import COLUMN_S
from dither.errors import ShapeError, SpecError
from dither.formats.layout import Layout
from dither.formats.spec import QuantSpec
from dither.methods.base import Method
from dither.models.anatomy import Anatomy, block_names
from dither.models.layers import has_gram, is_layer, matrix_shape
from dither.models.network import Network

SPILL_BUDGET = 2**30  # bytes of activations that stay in memory, unless the caller says otherwise
_PASSES = 20  # measured on ViTs: links, ranges, searches, Grams and errors cost this many forward passes
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
        inputs = method.input_spec(name, anatomy.entry)
        if inputs is not None and inputs.granularity == "token" and isinstance(model.get_submodule(name), nn.Conv2d):
            raise SpecError(f"{name}: a convolution has no tokens; write int{inputs.bits}:tensor, or skip it")
        try:
            Layout(spec, _matrix_shape(model, name)).tensors()
        except ShapeError as error:
            raise ShapeError(f"{name}: {error}") from None
    for name in ("activations", "attention", "probabilities", "entry_activations"):
        spec = getattr(method, name)
        if isinstance(spec, QuantSpec) and not spec.for_activations:
            raise SpecError(f"{name} {spec}: this is a format of weights; write int{spec.bits}:tensor")
        if isinstance(spec, QuantSpec) and spec.granularity in ("group", "channel"):
            raise SpecError(
                f"{name} {spec}: activations have one range a tensor or a token; write int{spec.bits}:tensor"
            )


def _refusal(name: str, spec: QuantSpec, method: Method) -> str:
    if spec.kind == "nuq":
        return f"{name}: {spec} needs a method that fits a codebook, such as squeezellm; {method.name} does not"
    bits = 4 if method.kinds[0] in ("nf", "fp") else spec.bits
    kinds = ", ".join(method.kinds)
    return f"{name}: {method.name} stores weights as one of {kinds}, got {spec}; try {method.kinds[0]}{bits}"


def _matrix_shape(model: nn.Module, name: str) -> tuple[int, int]:
    layer = model.get_submodule(name)
    if not is_layer(layer):
        raise SpecError(f"{name} is a {type(layer).__name__}, not a layer")
    return matrix_shape(layer)


@dataclass
class Sizes:
    """Bytes of one batch: of a module's inputs and outputs together, and of a layer's input."""

    around: Counter[str] = field(default_factory=Counter)
    inputs: Counter[str] = field(default_factory=Counter)

    def scaled(self, samples: int) -> "Sizes":
        """Those of a batch of so many samples, if these are of one."""
        around, inputs = (Counter({n: samples * x for n, x in part.items()}) for part in (self.around, self.inputs))
        return Sizes(around, inputs)


@contextmanager
def sizes_seen(model: nn.Module) -> Iterator[Sizes]:
    """While open, what passes through blocks and layers is measured."""
    sizes = Sizes()

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            parts = [*args, *(output if isinstance(output, tuple) else (output,))]
            sizes.around[name] = sum(x.nbytes for x in parts if isinstance(x, torch.Tensor))
            sizes.inputs[name] += sum(x.nbytes for x in args[:1] if isinstance(x, torch.Tensor))

        return hook

    names = [*block_names(model), *(name for name, module in model.named_modules() if is_layer(module))]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def memory(network: Network, anatomy: Anatomy, sizes: Sizes, batches: int, spill_budget: int) -> int:
    """Bytes that a run takes at most, by estimate: a block twice, its Grams, what solving takes, activations."""
    model = network.model
    largest = max((_bytes(model.get_submodule(unit.name)) for unit in anatomy.units), default=0)
    working = max((sum(sizes.inputs[name] for name in unit.layers) for unit in anatomy.units), default=0)
    between = max((sizes.around[unit.name] for unit in anatomy.units), default=0)
    kept = network.resident_bytes + 2 * largest
    return kept + _gram_bytes(model, anatomy) + _COPIES * working + min(between * batches, spill_budget)


def _gram_bytes(model: nn.Module, anatomy: Anatomy) -> int:
    """Of a unit's Grams in float64, and of three more like the largest: its copy in order, a factor, the inverse."""
    most = 0
    for unit in anatomy.units:
        layers = [model.get_submodule(name) for name in unit.layers]
        columns = [matrix_shape(layer)[1] for layer in layers if is_layer(layer) and has_gram(layer)]
        grams = [8 * (count + 1) ** 2 for count in columns]
        most = max(most, sum(grams) + 3 * max(grams, default=0))
    return most


def make_plan(network: Network, anatomy: Anatomy, method: Method, batches: Any) -> dict[str, Any]:
    """Layers with their formats and exact stored bytes, totals, and an estimate of time.

    The sizes are exact. The time is for a method that solves with Grams.
    """
    model = network.model
    check_formats(model, anatomy, method)
    rows = [_plan_layer(model, name, method) for name in anatomy.layers]
    original = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = original - sum(model.get_parameter(f"{row['name']}.weight").nbytes for row in rows)
    size = kept + sum(row["nbytes"] for row in rows)
    return {
        "schema": 1,
        "kind": "plan",
        "method": method.name,
        "units": len(anatomy.units),
        "streamed": network.weights is not None,
        "layers": rows,
        "kept": dict(anatomy.kept),
        "size_bytes": size,
        "original_bytes": original,
        "gram_bytes": _gram_bytes(model, anatomy),
        "disk_bytes": 2 * size,  # finished units wait beside the result until it is whole
        "estimated_time_s": _PASSES * _pass_seconds(network, batches[0]) * len(batches) + _solve_seconds(rows),
    }


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _pass_seconds(network: Network, batch: Any) -> float:
    """Of a forward pass, without the reading of blocks: the walk reads each once for all its passes."""
    reading = 0.0 if network.weights is None else network.weights.read_s
    start = perf_counter()
    with torch.no_grad():
        network.run(batch)
    reading = 0.0 if network.weights is None else network.weights.read_s - reading
    return perf_counter() - start - reading


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
    return float(3 * work / rate + COLUMN_S * columns)
