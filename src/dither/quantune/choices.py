"""The configurations that a search may choose for a model: every method with every format, range search and so on.

Source: Lee et al., Quantune, 2022, arXiv 2202.05048: calibration size, scheme, clipping, granularity, mixed ends.
Departs from the paper: the method and the formats are dimensions too; ranges are searched by percentile or squared
error where the paper takes a histogram's divergence; symmetric with uint8 for tensors without negative values has no
counterpart; mixed ends are the first and last units in full precision or in 8 bits; an activation's range is always of
a tensor.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from dither.errors import DitherError, InputError, nearest
from dither.formats.layout import Layout
from dither.formats.spec import QuantSpec
from dither.methods import METHODS, PRESETS, method_class
from dither.methods.base import Method
from dither.models.anatomy import Anatomy
from dither.models.layers import is_layer, matrix_shape
from dither.models.selection import without
from dither.planning import check_formats
from dither.recipe import parse_method, to_yaml
from dither.tuning.space import Dimension, Space, Value

SCHEMES = {"asym": "asym:anyscale", "sym": "sym:anyscale", "pow2": "sym:pow2"}
FREE: dict[str, tuple[Value, ...]] = {  # what a search chooses from unless it is told otherwise
    "scheme": ("asym", "sym", "pow2"),
    "search": ("minmax", "percentile", "mse"),
    "granularity": ("tensor", "channel", "g64"),
    "ends": ("quantized", "int8", "kept"),
}
PICTURES, SEQUENCES = (8, 32, 128), (16, 64, 128)  # how many to calibrate on
NAMED = ("method", "weights", "activations", *FREE, "samples")


@dataclass
class Choices:
    """The space of one model, and what was left out of it and why (`notes`)."""

    model: nn.Module
    anatomy: Anatomy
    notes: list[str] = field(default_factory=list)

    def space(self, dimensions: Sequence[Dimension], size_limit: float | None = None) -> Space:
        """All combinations that a method takes, that differ, and that can be below a limit of bytes.

        Raises:
            InputError: none is left; the message says why.
        """
        refused: dict[str, Counter[str]] = {}
        allowed: Counter[str] = Counter()
        seen: set[tuple[str, Value]] = set()
        sizes: dict[str, int] = {}
        texts: dict[tuple[Value, ...], str] = {}
        large, same = 0, 0

        def fits(configuration: dict[str, Value]) -> bool:
            nonlocal large, same
            name = str(configuration["method"])
            key = tuple(value for dimension, value in configuration.items() if dimension != "samples")
            if key not in texts:
                try:
                    method = self.method(configuration)
                    texts[key] = to_yaml(method)
                    sizes[texts[key]] = self.least_bytes(method)
                except DitherError as error:
                    refused.setdefault(name, Counter())[str(error)] += 1
                    texts[key] = ""
            text = texts[key]
            if not text:
                return False
            if size_limit is not None and sizes[text] > size_limit:
                large += 1
                return False
            twin = (text, configuration.get("samples", 0))
            same += twin in seen
            allowed[name] += twin not in seen
            new = twin not in seen
            seen.add(twin)
            return new

        _check_names(dimensions)
        try:
            space = Space.of(dimensions, fits)
        except InputError as error:
            if not (large or refused) or "holds no" not in str(error):
                raise
            raise InputError(self._nothing(refused, sizes, size_limit)) from None
        self._tell(refused, allowed, same, large)
        return space

    def method(self, configuration: Mapping[str, Value]) -> Method:
        """The method of a configuration, checked to fit the model.

        Raises:
            DitherError: a format that the method or a layer does not take.
        """
        method = parse_method(str(configuration["method"]), self.fields(configuration))
        left = without(self.anatomy, method.skip)
        if not left.units:
            raise InputError(f"{method.name}: all layers are kept, as the first and last unit are all that there is")
        check_formats(self.model, left, method)
        return method

    def fields(self, configuration: Mapping[str, Value]) -> dict[str, Any]:
        """The fields of a configuration, beside those that the method's text sets."""
        values = {**{name: str(of[0]) for name, of in FREE.items()}, **{k: str(v) for k, v in configuration.items()}}
        scheme, search = SCHEMES[values["scheme"]], values["search"]
        fields: dict[str, Any] = {
            "weights": _format(values["weights"], f"{values['granularity']}:{scheme}:{search}"),
            "activations": "none",
        }
        if values["activations"] != "none":
            fields["activations"] = _format(values["activations"], f"tensor:{scheme}:{search}")
        if values["ends"] == "kept":
            fields["skip"] = self.ends()
        elif values["ends"] != "quantized":
            fields["overrides"] = dict.fromkeys(self.ends(), _format(values["ends"], "channel"))
        return fields

    def ends(self) -> list[str]:
        """The layers of the first and the last unit."""
        units = self.anatomy.units
        return list(dict.fromkeys([*units[0].layers, *units[-1].layers]))

    def least_bytes(self, method: Method) -> int:
        """Bytes of the result by its formats; outliers and corrections that a method adds are not known before."""
        total = sum(p.numel() * p.element_size() for p in self.model.parameters())
        for name in without(self.anatomy, method.skip).layers:
            layer = self.model.get_submodule(name)
            if is_layer(layer):
                total += _stored(method.weight_spec(name), matrix_shape(layer)) - layer.weight.nbytes
        return total

    def _tell(self, refused: Mapping[str, Counter[str]], allowed: Counter[str], same: int, large: int) -> None:
        partly: Counter[str] = Counter()
        for name, reasons in refused.items():
            if allowed[name]:
                partly += reasons
            else:
                self.notes.append(f"{name} is left out: {reasons.most_common(1)[0][0]}")
        if partly:
            example = partly.most_common(1)[0][0]
            self.notes.append(f"{partly.total()} combinations do not fit and are left out, such as: {example}")
        if same:
            self.notes.append(f"{same} combinations mean the same as others to their method and are tried once")
        if large:
            self.notes.append(
                f"{large} combinations are over the limit of size by their formats alone and are not tried"
            )

    def _nothing(self, refused: Mapping[str, Counter[str]], sizes: Mapping[str, int], size_limit: float | None) -> str:
        if sizes and size_limit is not None:
            smallest = min(sizes.values())
            least = f"the smallest takes {smallest} bytes"
            return f"no configuration is below size={size_limit:.0f}: {least}; give narrower weights, or a wider limit"
        name, reasons = next(iter(refused.items()))
        return f"no method takes these formats; {name}: {reasons.most_common(1)[0][0]}"


def dimensions_of(
    methods: Sequence[str],
    weights: Sequence[str],
    activations: Sequence[str],
    given: Mapping[str, Sequence[Value]],
    samples: Sequence[int],
) -> list[Dimension]:
    """The dimensions of a search; `given` replaces the values of `FREE` ones and of `samples`.

    Raises:
        InputError: there is no such dimension or value.
    """
    for name in given:
        if name not in (*FREE, "samples"):
            raise InputError(f"expected a dimension {', '.join((*FREE, 'samples'))}; got {name!r}{nearest(name, FREE)}")
    values: dict[str, Sequence[Value]] = {
        "method": list(methods) or [*METHODS, *PRESETS], "weights": weights, "activations": activations, **FREE,
        "samples": samples, **given,
    }  # fmt: skip
    for name, allowed in (("scheme", tuple(SCHEMES)), ("search", FREE["search"])):
        for value in values[name]:
            if value not in allowed:
                raise InputError(f"{name}: expected {', '.join(map(str, allowed))}; got {value!r}")
    for value in values["samples"]:
        if not isinstance(value, int) or value < 1:
            raise InputError(f"samples: expected whole numbers of at least 1, got {value!r}")
    return [Dimension(name, tuple(values[name])) for name in NAMED]


def _check_names(dimensions: Sequence[Dimension]) -> None:
    names = [dimension.name for dimension in dimensions]
    if unknown := [name for name in names if name not in NAMED]:
        raise InputError(f"expected dimensions {', '.join(NAMED)}; got {unknown[0]!r}")
    if lacking := [name for name in ("method", "weights", "activations") if name not in names]:
        raise InputError(f"the space has no dimension {lacking[0]!r}")
    methods = next(dimension.values for dimension in dimensions if dimension.name == "method")
    for text in methods:  # a misspelt one is an error of the user's, not a method that does not fit
        method_class(str(text).split("+")[0].strip())


def _format(text: str, tokens: str) -> str:
    """A format with tokens in front of its own, which win."""
    head, *own = text.split(":")
    return ":".join([head, tokens, *own])


@lru_cache(maxsize=4096)
def _stored(spec: QuantSpec, shape: tuple[int, int]) -> int:
    return Layout(spec, shape).nbytes
