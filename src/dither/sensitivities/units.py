"""Which layers must share a choice, found by running the model once on one sample, and what each unit costs.

Layers that are given the very same tensor share one (q, k and v; gate and up; a convolution and the shortcut beside
it, as in HAWQ-V3), for runtimes fuse them or quantize their input once; so do all experts of a block, and layers that
share a weight. Other ties are the user's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.allocation.table import ACTIVATIONS, BOPS, CODES, LATENCY, SIZE, Fixed, Option, Unit
from dither.errors import InputError, ShapeError
from dither.formats.layout import Layout
from dither.models.anatomy import Anatomy
from dither.models.gradients import row_of, rows_of
from dither.models.layers import given_input, is_layer, matrix_shape
from dither.models.network import Network
from dither.models.selection import matching
from dither.nn.experts import Experts

FULL_BITS = 16  # of a number in full precision, where operations are counted


@dataclass
class Traced:
    """Of one sample: which layers are given the same tensor, multiplications and input numbers of each layer."""

    groups: list[list[str]] = field(default_factory=list)
    products: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)


def trace(network: Network, anatomy: Anatomy, batch: Any) -> Traced:
    """Run the model on the batch's first sample."""
    traced, given = Traced(), dict[tuple[Any, ...], list[str]]()
    alive: list[Tensor] = []  # memory that is freed could be given to another tensor
    owner = {name: unit.name for unit in anatomy.units for name in unit.layers}

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = given_input(args, kwargs)
            alive.append(x)
            key = (owner[name], x.data_ptr(), tuple(x.shape), x.stride(), x._version)
            given.setdefault(key, []).append(name)
            traced.inputs[name] = traced.inputs.get(name, 0) + x.numel()

        return hook

    def after(name: str, columns: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            traced.products[name] = traced.products.get(name, 0) + output.numel() * columns

        return hook

    handles = []
    for name in anatomy.layers:
        layer = network.model.get_submodule(name)
        columns = matrix_shape(layer)[1] if is_layer(layer) else 0
        handles += [
            layer.register_forward_pre_hook(before(name), with_kwargs=True),
            layer.register_forward_hook(after(name, columns)),
        ]
    try:
        with torch.no_grad():
            network.run(row_of(batch, 0, rows_of(batch)), whole=False)
    finally:
        for handle in handles:
            handle.remove()
    traced.groups = [group for group in given.values() if len(group) > 1]
    return traced


def find_units(network: Network, anatomy: Anatomy, traced: Traced, ties: Iterable[str] = ()) -> tuple[Unit, ...]:
    """Units in execution order; every text in `ties` is a comma-separated list of patterns whose layers share one.

    Raises:
        InputError: a pattern that matches no layer.
    """
    model, names = network.model, anatomy.layers
    groups: list[Sequence[str]] = list(traced.groups)
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    groups += [[name for name in names if name.startswith(f"{place}.")] for place in experts]
    weights: dict[int, list[str]] = {}
    for name in names:
        weights.setdefault(id(model.get_submodule(name).weight), []).append(name)
    groups += list(weights.values())
    groups += [[n for pattern in text.split(",") for n in matching(pattern.strip(), names)] for text in ties]
    leader = _joined(names, groups)
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(leader[name], []).append(name)
    return tuple(Unit(_name(layers), tuple(layers), _parameters(model, layers)) for layers in members.values())


def able(network: Network, units: Sequence[Unit], options: Sequence[Option]) -> Any:
    """[u, p]: whether every layer of a unit can be stored as an option; a group size may not divide its columns."""
    return np.array([[all(_fits(network, n, one) for n in unit.layers) for one in options] for unit in units])


def unit_costs(
    network: Network,
    units: Sequence[Unit],
    options: Sequence[Option],
    possible: Any,
    traced: Traced,
    latency: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Float[np.ndarray, "u p"]]:
    """What each unit takes of each resource as each option, infinite where it cannot have it.

    `latency` gives measured times by layer name, or by shape as `576x1536` (o, i), and option.

    Raises:
        InputError: a layer or an option that the measured times lack.
    """
    measures: dict[str, Callable[[Unit, Option], float]] = {
        SIZE: lambda unit, option: float(sum(_stored_bits(network, n, option) for n in _own(network, unit))),
        CODES: lambda unit, option: float(sum(_code_bits(network, n, option) for n in _own(network, unit))),
        BOPS: lambda unit, option: float(sum(traced.products.get(n, 0) for n in unit.layers) * _product_bits(option)),
        ACTIVATIONS: lambda unit, option: float(
            max(traced.inputs.get(n, 0) for n in unit.layers) * _input_bits(option)
        ),
    }
    if latency is not None:
        measures[LATENCY] = lambda unit, option: sum(_time(network, n, option, latency) for n in unit.layers)
    return {
        resource: np.array(
            [
                [cost(unit, option) if possible[u, p] else np.inf for p, option in enumerate(options)]
                for u, unit in enumerate(units)
            ]
        )
        for resource, cost in measures.items()
    }


def fixed_parts(network: Network, anatomy: Anatomy, units: Sequence[Unit]) -> tuple[Fixed, ...]:
    """Everything that is stored beside the units' weights, in the bits that it is stored in."""
    sizes = network.sizes()
    for name in (name for unit in units for name in unit.layers):
        sizes.pop(f"{name}.weight", None)
    parts = []
    for name, reason in anatomy.kept.items():
        if (size := sizes.pop(f"{name}.weight", 0)) > 0:
            parts.append(Fixed(name, 8 * size, reason))
    if rest := sum(sizes.values()):
        largest = max(sizes, key=lambda name: sizes[name])
        parts.append(Fixed("the rest", 8 * rest, f"embeddings, norms, biases; the largest is {largest}"))
    return tuple(parts)


def _joined(names: Sequence[str], groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """The first layer of each layer's group, groups that overlap being one."""
    leader = {name: name for name in names}
    place = {name: index for index, name in enumerate(names)}
    for group in groups:
        heads = {leader[name] for name in group}
        first = min(heads, key=lambda name: place[name]) if heads else ""
        leader |= {name: first for name, head in leader.items() if head in heads}
    return leader


def _name(layers: Sequence[str]) -> str:
    """`a.b.{q,k,v}` for layers below one module."""
    if len(layers) == 1:
        return layers[0]
    parts = [name.split(".") for name in layers]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    rest = [".".join(part[same:]) for part in parts]
    shown = ",".join(rest if len(rest) <= 4 else [*rest[:2], f"… {len(rest)} layers"])
    return ".".join([*parts[0][:same], "{" + shown + "}"])


def _own(network: Network, unit: Unit) -> list[str]:
    """Layers of a unit, one for each weight."""
    first = {id(network.model.get_submodule(name).weight): name for name in reversed(unit.layers)}
    return [name for name in unit.layers if name in first.values()]


def _parameters(model: nn.Module, layers: Sequence[str]) -> int:
    weights = {id(weight): weight.numel() for weight in (model.get_parameter(f"{name}.weight") for name in layers)}
    return sum(weights.values())


def _shape(network: Network, name: str) -> tuple[int, int]:
    layer = network.model.get_submodule(name)
    if not is_layer(layer):
        raise TypeError(f"{name} is a {type(layer).__name__}, not a layer")
    return matrix_shape(layer)


def _fits(network: Network, name: str, option: Option) -> bool:
    conv = isinstance(network.model.get_submodule(name), nn.Conv2d)
    if option.activations is not None and conv and option.activations.granularity != "tensor":
        return False
    try:
        if option.weights is not None:
            Layout(option.weights, _shape(network, name)).tensors()
    except ShapeError:
        return False
    return True


def _stored_bits(network: Network, name: str, option: Option) -> int:
    weight = network.model.get_parameter(f"{name}.weight")
    if option.weights is None:
        return 8 * weight.element_size() * weight.numel()
    return 8 * Layout(option.weights, _shape(network, name)).nbytes


def _code_bits(network: Network, name: str, option: Option) -> int:
    weight = network.model.get_parameter(f"{name}.weight")
    return weight.numel() * (8 * weight.element_size() if option.weights is None else option.weights.bits)


def _product_bits(option: Option) -> int:
    weights = FULL_BITS if option.weights is None else option.weights.bits
    return weights * _input_bits(option)


def _input_bits(option: Option) -> int:
    return FULL_BITS if option.activations is None else option.activations.bits


def _time(network: Network, name: str, option: Option, latency: Mapping[str, Mapping[str, float]]) -> float:
    shape = "x".join(map(str, _shape(network, name)))
    times = latency.get(name, latency.get(shape))
    if times is None or str(option) not in times:
        raise InputError(f"the latency table has no time of {name} ({shape}) as {option}; measure it, or leave it out")
    return float(times[str(option)])
