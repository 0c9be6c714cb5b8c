"""BAQ: bits for each column of a weight so that all columns lose the same, then GPTQ.

Source: BAQ: Efficient Bit Allocation Quantization for Large Language Models, arXiv 2506.05664, and its released code:
GPTQ with a static range for each row, asymmetric, damping 0.01, no act-order; the average rate is met in every matrix.
`steps="levels"` is the paper's: a column has a whole number of levels, whose bits are a fraction. In storage it takes
whole bits, which are counted, so that such a result is larger than its rate says; `bits` (the default) gives whole bits
that add up exactly. A text such as int3:g64 is read as mix3:g64: 3 bits on average, ranges of groups of 64 columns.
Departs from the released code: losses are measured at each width, or come from the formula (`losses="law"`, exponent 2
where the code has an empirical 1.95), not from a first GPTQ run of the whole model; no column has more than 8 bits;
columns without any input have none; zero-points are real numbers; columns of few bits span less of a row's range
(`formats/mixed.py`), and ranges are those of least error (write minmax for the extremes); groups are fitted when the
sweep reaches them; bits may be restricted to a set, or shared by a block's matrices (`scope="block"`, by output errors
relative to each layer's output [choice]). Where other widths promise no smaller error, all columns keep one width.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field

from dither.allocation.columns import equal_loss_bits
from dither.calibrate import LayerSolution, LayerTask, solve_and_store
from dither.engine.local import Engine
from dither.errors import SpecError
from dither.formats.mixed import fit_mixed
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind, QuantSpec, spec_field
from dither.methods.base import Method
from dither.solvers.columns import Ordered
from dither.solvers.mixed_columns import ColumnBits, Losses, Steps, column_losses, round_mixed
from dither.walk import Block, Inputs


def as_mixed(spec: QuantSpec) -> QuantSpec:
    """An integer format as the mixed one of the same average bits, with real zero-points and any search by error.

    Raises:
        SpecError: it is no integer format, or has two grids, powers of two, or groups along the outputs.
    """
    if spec.kind == "mix":
        return spec
    if spec.kind != "int":
        raise SpecError(f"{spec}: columns of different widths are integers; write int{spec.bits}")
    changed = {"kind": "mix", "search": "minmax" if spec.search == "minmax" else "mse"}
    changed |= {"zero_point": "real"} if spec.symmetry == "asym" else {"zero_point": "integer"}
    kept = {name: value for name, value in spec.fields().items() if name != "percentiles"}
    return QuantSpec(**kept | changed)


BASE = QuantSpec.parse("mix4:channel:asym:mse:realzero")
MixedSpec = Annotated[QuantSpec, spec_field(BASE), AfterValidator(as_mixed)]


class BAQ(Method):
    """Column-by-column rounding at a mean width; `damping` is in units of the mean diagonal of the Gram."""

    name: ClassVar[str] = "baq"
    shards: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mix")
    adds: ClassVar[tuple[str, ...]] = ("columns of different widths",)
    weights: MixedSpec = Field(default="int4", description="what layers are stored as; its bits are a mean")  # type: ignore[assignment]
    overrides: dict[str, MixedSpec] = Field(default={}, description="other weight formats by name or pattern")
    inputs: Inputs = Field(default="quantized", description="the paper measures behind the quantized prefix")
    average: Annotated[float, Field(ge=0, le=8)] | Literal["format"] = Field(
        default="format", description="mean bits of a column, such as 2.5, or those of the format"
    )
    scope: Literal["matrix", "block"] = Field(default="matrix", description="what meets the average")
    per: Literal["column", "group"] = Field(default="column", description="what has one width")
    steps: Steps = Field(default="bits", description="whole bits of a column, or the paper's whole levels")
    losses: Losses = Field(default="measured", description="c 4^-bits as in the paper, or measured at each width")
    allowed: tuple[Annotated[int, Field(ge=0, le=8)], ...] = Field(
        default=tuple(range(9)), min_length=1, description="widths that there may be, such as [2, 4, 8]"
    )
    static_groups: bool = Field(default=False, description="grids of the original weight; false: fitted on the way")
    act_order: bool = Field(default=True, description="columns of largest input energy first; the code: false")
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01  # released code: percdamp

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Measure Grams of quantized inputs, share bits within the scope, then solve each layer on its own."""
        for block in blocks:
            tasks, quantizers = self.measure(block)
            rates = self.shared(tasks) if self.scope == "block" else {}
            solve_and_store(block, tasks, quantizers, partial(self.solve, rates=rates), engine)

    def solve(self, task: LayerTask, rates: Mapping[str, float]) -> LayerSolution:
        """One layer; without a Gram (grouped convolution) nearest codes of one width, which the notes say."""
        spec = self.weight_spec(task.name)
        if task.gram is None:
            top = torch.full((task.columns,), spec.levels - 1, dtype=torch.uint8, device=task.weight.device)
            stored = quantize(task.weight, fit_mixed(task.weight, spec, top))
            return LayerSolution(stored, task.bias, {"rounding": "nearest: grouped convolution"})
        gram = task.gram.quantized[: task.columns, : task.columns]
        how = ColumnBits(self.losses, self.steps, self.allowed, self.per == "group", self.static_groups)
        rate = rates.get(task.name, self.rate(task.name))
        stored, notes = round_mixed(task.weight.to(gram), gram, spec, rate, how, self.damping, self.act_order)
        widths = {str(bits): count for bits, count in enumerate(stored.layout.widths or ()) if count}
        return LayerSolution(stored, task.bias, {**notes, "average": rate, "columns_of_bits": widths})

    def rate(self, layer: str) -> float:
        """The mean bits of a layer's columns: `average`, but those of its format where an override names it."""
        spec = self.weight_spec(layer)
        return float(spec.bits) if self.average == "format" or spec != self.weights else self.average

    def shared(self, tasks: list[LayerTask]) -> dict[str, float]:
        """Each matrix's mean bits at which all columns of all matrices lose the same for each bit of storage.

        A matrix's losses count relative to the energy of its output; layers without a Gram keep their own rate.
        """
        losses, costs, names = [], [], []
        for task in tasks:
            if task.gram is None:
                continue
            gram = task.gram.quantized[: task.columns, : task.columns]
            weight = task.weight.to(gram)
            ordered = Ordered.of(weight, gram, task.columns, self.damping, self.act_order)
            diagonal = ordered.upper.diagonal()[torch.argsort(ordered.order)]
            energy = ((weight @ gram) * weight).sum().clamp_min(1e-30)
            law = column_losses(task.weight, diagonal, self.weight_spec(task.name)) * (gram.diagonal() > 0)
            losses.append(law / energy)
            costs.append(torch.full_like(law, len(weight)))
            names += [(task.name, self.rate(task.name))]
        if not names:
            return {}
        cost = torch.cat(costs)
        budget = sum(float(part.sum()) * rate for part, (_, rate) in zip(costs, names, strict=True))
        bits = equal_loss_bits(torch.cat(losses), budget / float(cost.sum()), cost)
        means = [float(part.mean()) for part in bits.split([len(part) for part in losses])]
        return {name: mean for (name, _), mean in zip(names, means, strict=True)}
