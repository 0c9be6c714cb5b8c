"""What every method is: a frozen, validated configuration with one `run`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dither.calibrate import LayerSolution, LayerTask, measure, quantize_operands, reparameterize
from dither.engine.local import Engine
from dither.formats.spec import WEIGHT_PERCENTILES, Kind, QuantSpec, read_spec, spec_field
from dither.models.distil import Distillation
from dither.models.gradients import Gradients
from dither.models.preparing import Prepared, Subject
from dither.nn.activation import ActivationQuantizer
from dither.statistics.sensitivity import Sensitivity
from dither.walk import Block, Inputs

# ERQ's long list of percentiles serves every method, so that all search their ranges alike
WEIGHTS = QuantSpec.parse("int4:channel:asym:percentile").model_copy(update={"percentiles": WEIGHT_PERCENTILES})
FINE = 6  # bits from which uniform steps are finer than log-sqrt2's, whose relative error does not fall with bits
ACTIVATIONS = "int4:tensor:asym:percentile"
WeightSpec = Annotated[QuantSpec, spec_field(WEIGHTS)]
ActivationSpec = Annotated[QuantSpec | None, spec_field(ACTIVATIONS)]
ProbabilitySpec = Annotated[QuantSpec | None, spec_field("logsqrt2-4:tensor:unsigned:percentile")]


class Method(BaseModel):
    """A published system as data: its fields are the paper's hyper-parameters, `run` is its loop.

    `attention` (query, key, value) and `probabilities` follow the bits of `activations` where they are not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    name: ClassVar[str]
    backward: ClassVar[bool] = False  # whether it takes gradients, for which all weights must be in memory
    shards: ClassVar[bool] = False  # whether ranks may share the batches: all that it measures is merged by the block
    kinds: ClassVar[tuple[Kind, ...]] = ("int", "mxint", "nf", "fp")  # of weight formats that it can fit
    inputs_as: ClassVar[str] = ACTIVATIONS  # what a text for activations leaves out
    adds: ClassVar[tuple[str, ...]] = ()  # what it stores beside codes, in words: only dither's own loader reads it

    weights: WeightSpec = Field(default=WEIGHTS, description="what layers are stored as")
    activations: ActivationSpec = Field(default=None, description="inputs of layers; none keeps them")
    attention: ActivationSpec = Field(default=None, description="query, key and value")
    probabilities: ProbabilitySpec = Field(default=None, description="softmax output")
    entry_activations: ActivationSpec = Field(default=None, description="input of the first layer, the picture itself")
    inputs: Inputs = Field(default="fp", description="whose inputs are calibrated on: fp, quantized prefix or both")
    fold_norms: bool = Field(default=True, description="batch normalizations into the layers before them, first")
    skip: tuple[str, ...] = Field(default=(), description="layers to keep: names or patterns with *")
    overrides: dict[str, WeightSpec] = Field(default={}, description="other weight formats by name or pattern")
    activation_overrides: dict[str, ActivationSpec] = Field(default={}, description="other formats of layers' inputs")

    @model_validator(mode="before")
    @classmethod
    def _follow_activations(cls, data: Any) -> Any:
        given = data.get("activations", cls.model_fields["activations"].default) if isinstance(data, dict) else None
        spec = read_spec(given, cls.inputs_as)
        if not isinstance(spec, QuantSpec):
            return data
        granularity = "tensor" if spec.granularity == "channel" else spec.granularity
        follow = {
            "attention": spec.model_copy(update={"granularity": granularity}),
            "probabilities": cls._probabilities(spec.bits, data),
        }
        return follow | data

    @classmethod
    def _probabilities(cls, bits: int, data: Mapping[str, Any]) -> str:
        """The format of softmax outputs that goes with activations of so many bits."""
        return f"logsqrt2-{bits}" if bits < FINE else f"int{bits}"

    @property
    def takes_gradients(self) -> bool:
        """Whether this configuration needs all weights in memory."""
        return self.backward

    def run(self, blocks: Iterable[Block], engine: Engine) -> None:
        """Quantize every block that the walk gives, in place."""
        raise TypeError(f"{type(self).__name__} does not define run")

    def sensitivities(self, layers: Sequence[str], gradients: Gradients) -> Mapping[str, Sensitivity]:
        """What the method asks of the whole full-precision network before the walk, by layer; nothing by default.

        A resumed run asks again, so the answer must follow from network and calibration data alone.
        """
        return {}

    def without_data(self) -> Distillation | None:
        """How pictures are made where a user gives none; None: the method needs data."""
        return None

    def prepare(self, subject: Subject) -> Prepared:
        """What the method does to the whole network before the walk; nothing by default.

        A resumed run prepares again, so the result must follow from network and calibration data alone.
        """
        return Prepared()

    def foresee(self, subject: Subject) -> Prepared:
        """What a plan needs of `prepare`; a method whose preparation measures something long says less here.

        Pictures that would be distilled are noise then.
        """
        return self.prepare(subject)

    def alone(self, spec: QuantSpec) -> Callable[[LayerTask], LayerSolution] | None:
        """What solves a layer in a format from its task alone, bias left as it is; None where a method needs more.

        Score tables are measured with these weights; for other methods with the nearest codes.
        """
        return None

    def measure(
        self, block: Block, reparameterized: bool = False, round_zero_point: bool = True
    ) -> tuple[list[LayerTask], dict[str, ActivationQuantizer]]:
        """What to solve in a block and how its inputs are quantized, with the attention operands done already."""
        quantize_operands(block, self.operand_specs(), self.inputs)
        fitted = {}
        if reparameterized and self.activations is not None:
            fitted = reparameterize(block, self.activations, self.inputs, round_zero_point)
        specs = self.input_specs(block)
        fitted = {name: quantizer for name, quantizer in fitted.items() if specs.get(name) == quantizer.spec}
        return measure(block, specs, self.inputs, fitted)

    def weight_spec(self, layer: str) -> QuantSpec:
        """The weight format of a layer: that of the first matching override, else `weights`."""
        return next((spec for pattern, spec in self.overrides.items() if fnmatchcase(layer, pattern)), self.weights)

    def input_spec(self, layer: str, entry: str) -> QuantSpec | None:
        """The format of a layer's input: of the first matching override, else `activations`.

        `entry` is the layer that reads the network's own input, whose format is `entry_activations`.
        """
        default = self.entry_activations if layer == entry else self.activations
        return next((s for pattern, s in self.activation_overrides.items() if fnmatchcase(layer, pattern)), default)

    def input_specs(self, block: Block) -> dict[str, QuantSpec | None]:
        """The format of each layer's input."""
        return {name: self.input_spec(name, block.entry) for name in block.unit.layers}

    def operand_specs(self) -> dict[str, QuantSpec | None]:
        """Format of each attention operand."""
        shared = dict.fromkeys(("query", "key", "value"), self.attention)
        return shared | {"probabilities": self.probabilities}
