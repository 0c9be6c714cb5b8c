"""PTQ4ViT: twin ranges behind softmax and GELU, and ranges that are searched by what they do to a layer's output.

Source: Yuan et al., PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization, ECCV
2022, arXiv 2111.12293, and its released code: symmetric ranges; 3 alternations of 100 candidates between 0.01 and 1.2
of the range for weight and input; the error of an output is weighed by the squared gradient of the loss. The preset
`base-ptq` is the paper's baseline: one alternation between 0.5 and 1.2 by cosine, no twins.
Departs from the released code: its gradient is that of the divergence of a prediction from itself, which is zero but
for rounding (`gradients="divergence"`); the default draws labels from the prediction, whose squared gradients are the
Hessian that the paper means, and `label` takes the most likely class. Layers are judged by `rows` rows spread over all
samples, not by all. Scales are one a row, as in every method here (`weights="int6:tensor"` is the paper's one a layer).
A twin is chosen where it lowers the error of the output, not by the name of the activation function, and a value takes
the nearest level of both regions. Operands of attention have the ranges of least error of their own values, not of
their products. The patch embedding is treated as every method here does.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dither.calibrate import quantize_operands
from dither.draws import generator_of
from dither.engine.local import Engine
from dither.formats.qtensor import quantize
from dither.formats.spec import Kind, QuantSpec, spec_field
from dither.methods.base import Method
from dither.models.gradients import Gradients
from dither.models.losses import Loss, drawn_prediction_loss, own_prediction_loss, self_divergence_loss
from dither.models.output_gradients import output_rows
from dither.scale_search import Searched, SearchTask, calibrated, search_block
from dither.solvers.output_search import Candidates, search_in_turns
from dither.statistics.sensitivity import Sensitivity
from dither.walk import Block

_INPUTS = "int8:tensor:sym:mse"
WeightSpec = Annotated[QuantSpec, spec_field("int8:channel:sym:minmax")]
InputSpec = Annotated[QuantSpec | None, spec_field(_INPUTS)]


class PTQ4ViT(Method):
    """Searched symmetric ranges and twins; `lowest` and `highest` are shares of the range of the extremes."""

    name: ClassVar[str] = "ptq4vit"
    shards: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint")
    inputs_as: ClassVar[str] = _INPUTS

    weights: WeightSpec = Field(default="int8", description="what layers are stored as")  # type: ignore[assignment]
    activations: InputSpec = Field(default="int8", description="inputs of layers; none keeps them")  # type: ignore[assignment]
    attention: InputSpec = Field(default=None, description="query, key and value")
    overrides: dict[str, WeightSpec] = Field(default={}, description="other weight formats by name or pattern")
    metric: Literal["hessian", "squared", "cosine"] = Field(default="hessian", description="of a layer's output")
    gradients: Literal["drawn", "label", "divergence"] = Field(
        default="drawn", description="labels drawn from the prediction, its most likely, or the released code's loss"
    )
    twin: bool = Field(default=True, description="twin ranges behind softmax and GELU")
    rounds: Annotated[int, Field(ge=1)] = 3  # released code
    candidates: Annotated[int, Field(ge=1)] = 100  # released code
    lowest: Annotated[float, Field(gt=0)] = 0.01  # released code
    highest: Annotated[float, Field(gt=0)] = 1.2  # released code
    rows: Annotated[int, Field(ge=1)] = Field(default=512, description="rows of inputs that a layer is judged by")

    @classmethod
    def _probabilities(cls, bits: int, data: Mapping[str, Any]) -> str:
        return f"twin{bits}" if data.get("twin", True) and bits > 1 else f"int{bits}:tensor:unsigned:mse"

    @property
    def takes_gradients(self) -> bool:
        """Only the Hessian-guided metric does."""
        return self.metric == "hessian"

    def sensitivities(self, layers: Sequence[str], gradients: Gradients) -> Mapping[str, Sensitivity]:
        """Rows of every layer's input with squared gradients of its output, in full precision."""
        if self.metric != "hessian":
            return {}
        return {n: Sensitivity(rows=r) for n, r in output_rows(gradients, layers, self.rows, self.loss()).items()}

    def loss(self) -> Loss:
        """What is differentiated."""
        losses = {"label": own_prediction_loss, "divergence": self_divergence_loss}
        return losses.get(self.gradients) or drawn_prediction_loss(generator_of("labels"))

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Search the ranges of each layer on its own, then store it."""
        for block in blocks:
            quantize_operands(block, self.operand_specs(), self.inputs)
            weights = {name: self.weight_spec(name) for name in block.unit.layers}
            search_block(block, weights, self.input_specs(block), self.rows, self.inputs, engine, self.search)

    def search(self, task: SearchTask) -> Searched:
        """Ranges of one layer."""
        if task.rows is None:
            return task.nearest()
        found = search_in_turns(task.rows, task.weight, task.spec, task.inputs, self.how())
        return Searched(task.name, quantize(task.weight, found.grid), calibrated(found.spec, found.scales))

    def how(self) -> Candidates:
        """The search as its part wants it."""
        metric: Literal["cosine", "squared"] = "cosine" if self.metric == "cosine" else "squared"
        return Candidates(self.lowest, self.highest, self.candidates, self.rounds, metric, self.twin)
