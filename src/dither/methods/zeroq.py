"""ZeroQ: pictures distilled from batch-normalization statistics, and bits for each layer from the whole Pareto front.

Source: Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020, arXiv 2001.00281: distilled data (3.1),
sensitivity by KL divergence (eq. 4) and the Pareto front by dynamic programming (3.2), which the released code lacks.
Uniform quantizers, ranges behind quantized weights and the constants of distillation are the released code's.
Departs from it: batch normalizations are folded first; the inputs of layers are quantized, but for the first, where the
code quantizes outputs of ReLUs; sizes are of all that is stored; dominated points are dropped instead of sizes binned.
Open in the paper, our choice: KL(full precision ‖ quantized); no layer is pinned to 8 bits.
Calibration data that a user gives are used in place of distilled pictures, and the report says so.
"""

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BeforeValidator, ByteSize, Field

from dither.allocation.frontier import Frontier, frontier
from dither.allocation.problem import Problem
from dither.allocation.table import SIZE
from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.errors import InputError
from dither.folding import replaced_weight
from dither.formats.fit import fit_grid
from dither.formats.layout import Layout
from dither.formats.qtensor import quantize
from dither.formats.spec import QuantSpec
from dither.methods.base import ActivationSpec, Method, WeightSpec
from dither.models.distil import Distillation
from dither.models.layers import Layer, is_layer, matrix_shape, weight_matrix
from dither.models.links import first_tensor
from dither.models.losses import class_rows
from dither.models.preparing import Prepared, Subject
from dither.statistics.divergence import kl_rows, mean_and_error
from dither.walk import Block, Inputs

BITS = (2, 4, 8)  # the paper's
_RANGE_BYTES = 8  # scale and zero-point of a layer's input
_POINTS = 400  # of the front that a report shows


def _no_size(value: Any) -> Any:
    return None if value == "none" else value


class ZeroQ(Method):
    """Rounding to nearest without data; with `size` every layer gets the bits that the front gives it."""

    name: ClassVar[str] = "zeroq"
    shards: ClassVar[bool] = True
    weights: WeightSpec = Field(default=QuantSpec.parse("int8:channel:asym:minmax"), description="format without size")
    activations: ActivationSpec = Field(  # type: ignore[assignment]
        default="int8:tensor:asym:minmax", description="inputs of layers; none keeps them"
    )
    inputs: Inputs = Field(default="quantized", description="released code: ranges behind the quantized weights")
    size: Annotated[ByteSize | None, BeforeValidator(_no_size)] = Field(
        default=None, description="bytes of the whole result, such as 2.5MB; none: the same bits everywhere"
    )
    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(default=BITS, description="to choose from, with size")
    distillation: Distillation = Field(default=Distillation(), description="how pictures are made where none are given")

    def without_data(self) -> Distillation:
        """Pictures from batch normalizations."""
        return self.distillation

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Fit input ranges behind what is quantized already, round, store."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            solve_and_store(block, tasks, quantizers, self.solve, engine)

    def solve(self, task: LayerTask) -> LayerSolution:
        """The nearest codes of one layer."""
        return LayerSolution(quantize(task.weight, fit_grid(task.weight, self.weight_spec(task.name))), task.bias)

    def prepare(self, subject: Subject) -> Prepared:
        """Measure every layer at every width, find the front, take its best point within the size."""
        if self.size is None:
            return Prepared()
        started = perf_counter()
        layers, specs, costs, fixed = self.offers(subject)
        budget = self.budget(costs, fixed)
        scores = kl_scores(subject, layers, specs)
        front = frontier(Problem(scores, {SIZE: costs}, {SIZE: float(costs.max(axis=1).sum())}))
        point = front.best(budget)
        formats = {name: specs[place] for name, place in zip(layers, front.choice(point), strict=True)}
        facts = describe_front(front, point, fixed, layers, formats, scores, costs, specs)
        facts |= {"size_bytes": int(self.size), "time_s": perf_counter() - started, "pictures": _rows(subject.batches)}
        return Prepared(formats=formats, facts={"pareto": facts})

    def foresee(self, subject: Subject) -> Prepared:
        """The most bits that every layer can have alike within the size, whose Pareto front is not measured."""
        if self.size is None:
            return Prepared()
        layers, specs, costs, fixed = self.offers(subject)
        fitting = np.flatnonzero(costs.sum(axis=0) <= self.budget(costs, fixed))
        alike = specs[int(fitting.max())] if len(fitting) else specs[0]
        return Prepared(formats=dict.fromkeys(layers, alike))

    def offers(self, subject: Subject) -> tuple[list[str], list[QuantSpec], Float[np.ndarray, "u p"], int]:
        """Layers to choose for, formats to choose from, the bits of each layer in each, and bytes that are fixed."""
        layers = [name for name in subject.anatomy.layers if not self.pinned(name)]
        specs = [self.weights.model_copy(update={"bits": bits}) for bits in sorted(self.bits)]
        shapes = [matrix_shape(_layer(subject, name)) for name in layers]
        costs = np.array([[8.0 * Layout(spec, shape).nbytes for spec in specs] for shape in shapes])
        return layers, specs, costs, fixed_bytes(subject, layers, self)

    def budget(self, costs: Float[np.ndarray, "u p"], fixed: int) -> float:
        """Bits that the layers may take together.

        Raises:
            InputError: even the fewest bits everywhere take more.
        """
        if self.size is None:
            return float("inf")
        budget = 8.0 * (int(self.size) - fixed)
        least, most = costs.min(axis=1).sum() / 8 + fixed, costs.max(axis=1).sum() / 8 + fixed
        if budget < costs.min(axis=1).sum():
            raise InputError(
                f"size {int(self.size):,} bytes cannot be met: with {min(self.bits)} to {max(self.bits)} bits the "
                f"model takes {least:,.0f} to {most:,.0f}, of which {fixed:,} are not codes; ask for more"
            )
        return budget

    def pinned(self, name: str) -> bool:
        """Whether the user has chosen the layer's format."""
        return self.weight_spec(name) is not self.weights


def kl_scores(subject: Subject, layers: list[str], specs: list[QuantSpec]) -> Float[np.ndarray, "u p"]:
    """Ω_i(k): mean KL(full precision ‖ layer i's weight alone at k bits) over all pictures, eq. 4."""
    references = [class_rows(subject.run(batch)) for batch in subject.batches]
    scores = np.zeros((len(layers), len(specs)))
    for row, name in enumerate(layers):
        layer = _layer(subject, name)
        weight = weight_matrix(layer, name)
        for column, spec in enumerate(specs):
            stored = quantize(weight, fit_grid(weight, spec)).dequantize()
            with replaced_weight(layer, stored):
                found = [class_rows(subject.run(batch)) for batch in subject.batches]
            rows = torch.cat([kl_rows(*pair) for pair in zip(references, found, strict=True)])
            scores[row, column] = mean_and_error(rows)[0]
        subject.say("measuring sensitivities", row + 1, len(layers))
    return np.minimum.accumulate(scores, axis=1)  # more bits never count as worse: below 1e-6 only noise does


def fixed_bytes(subject: Subject, layers: list[str], method: ZeroQ) -> int:
    """Bytes of the result that do not depend on the choice: biases, kept and pinned layers, ranges of inputs."""
    chosen = {id(_layer(subject, name).weight) for name in subject.anatomy.layers}
    kept = sum(int(x.nbytes) for x in subject.model.state_dict(keep_vars=True).values() if id(x) not in chosen)
    others = [name for name in subject.anatomy.layers if name not in set(layers)]
    pinned = sum(Layout(method.weight_spec(name), matrix_shape(_layer(subject, name))).nbytes for name in others)
    names, entry = subject.anatomy.layers, subject.anatomy.entry
    inputs = [method.entry_activations if name == entry else method.activations for name in names]
    ranges = _RANGE_BYTES * sum(spec is not None and not spec.dynamic for spec in inputs)
    return kept + pinned + ranges


def describe_front(
    front: Frontier,
    point: int,
    fixed: int,
    layers: list[str],
    formats: Mapping[str, QuantSpec],
    scores: Float[np.ndarray, "u p"],
    costs: Float[np.ndarray, "u p"],
    specs: list[QuantSpec],
) -> dict[str, Any]:
    """The front as plain data: its points thinned, the one chosen, uniform bits, and each layer's scores."""
    stride = max(1, len(front) // _POINTS)
    shown = sorted({*range(0, len(front), stride), point, len(front) - 1})
    chosen = {"size_bytes": float(front.costs[point]) / 8 + fixed, "kl": float(front.scores[point])}
    return {
        "points": [{"size_bytes": float(front.costs[p]) / 8 + fixed, "kl": float(front.scores[p])} for p in shown],
        "length": len(front),
        "chosen": chosen,
        "uniform": [
            {"bits": spec.bits, "size_bytes": float(costs[:, p].sum()) / 8 + fixed, "kl": float(scores[:, p].sum())}
            for p, spec in enumerate(specs)
        ],
        "layers": [
            {"name": name, "bits": formats[name].bits, "kl": dict(zip([str(s.bits) for s in specs], row, strict=True))}
            for name, row in zip(layers, scores.tolist(), strict=True)
        ],
    }


def _layer(subject: Subject, name: str) -> Layer:
    layer = subject.model.get_submodule(name)
    if not is_layer(layer):
        raise TypeError(f"{name} is a {type(layer).__name__}, not a layer")
    return layer


def _rows(batches: Iterable[Any]) -> int:
    return sum(len(first_tensor(batch)) for batch in batches)
