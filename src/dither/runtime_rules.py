"""Whether a planned result would run where it is meant to: the plan as `dither.export.runtimes` reads it."""

from torch import nn

from dither.errors import InputError
from dither.export.runtimes import Finding, Planned, PlannedLayer, check
from dither.methods.base import Method
from dither.models.anatomy import Anatomy
from dither.models.layers import is_layer, matrix_shape
from dither.models.network import Network


def findings(network: Network, anatomy: Anatomy, method: Method, runtime: str) -> list[Finding]:
    """What the runtime has against the plan.

    Raises:
        InputError: an unknown runtime.
    """
    layers = tuple(_layer(network.model, name, anatomy, method) for name in anatomy.layers)
    operands = method.attention is not None or method.probabilities is not None
    operands = operands and any(unit.attention for unit in anatomy.units)
    config = network.config
    planned = Planned(
        layers, tuple(anatomy.kept), str(config.get("model_type", "")), bool(config.get("tie_word_embeddings")),
        method.adds, operands,
    )  # fmt: skip
    return check(planned, runtime)


def _layer(model: nn.Module, name: str, anatomy: Anatomy, method: Method) -> PlannedLayer:
    layer = model.get_submodule(name)
    shape = matrix_shape(layer) if is_layer(layer) else (0, 0)
    inputs = method.input_spec(name, anatomy.entry)
    return PlannedLayer(name, shape, method.weight_spec(name), inputs, not isinstance(layer, nn.Conv2d))


def refuse(found: list[Finding], runtime: str) -> None:
    """Stop a run whose result would not run where it is meant to.

    Raises:
        InputError: a fatal finding; the message gives the first and how many there are.
    """
    fatal = [one for one in found if one.fatal]
    if fatal:
        more = f" ({len(fatal) - 1} more problems: see --dry-run)" if len(fatal) > 1 else ""
        raise InputError(f"the result would not run in {runtime}: {fatal[0]}{more}")
