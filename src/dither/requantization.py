"""MRQ on a folder that dither wrote: another symmetric scheme for weights and activations, biases that keep the means.

Nothing is calibrated anew: weights are what their codes stand for, ranges those of the stored quantizers. What inputs
are on average is measured on drawn pictures, layer by layer, each seeing what the earlier ones have become.

Source: Kapur et al., MRQ, arXiv 2308.01867; see `dither.transforms.requantize`.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dither.errors import InputError
from dither.formats.activation import covered_range
from dither.formats.grid import Grid
from dither.formats.qtensor import QTensor
from dither.formats.spec import QuantSpec
from dither.models.network import Network, open_network
from dither.nn.activation import ActivationQuantizer
from dither.nn.attention import AttentionOperands
from dither.nn.linear import PackedWeight, QuantizedConv2d, QuantizedLinear
from dither.storage import write_json, write_network
from dither.transforms.requantize import activation_scale, folded_bias, weight_codes, weight_scale
from dither.unfinished import check_output

Layer = QuantizedLinear | QuantizedConv2d
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """The target and which of MRQ's parts are used; `unsigned` keeps activations that are never negative so."""

    spec: QuantSpec
    correct_weights: bool = True
    fold_errors: bool = True
    unsigned: bool = True


def requantize_result(
    folder: Path, output: Path, settings: Settings, draw: Callable[[tuple[int, ...]], Float[Tensor, "b c h w"]],
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a folder in the new scheme; `draw` makes the pictures of a shape [channels, height, width].

    Raises:
        InputError: dither did not write the folder, it reads no pictures, or a quantizer is no uniform grid.
    """
    check_output(output)
    network = open_network(folder)
    model = network.model
    layers = {name: one for name, one in model.named_modules() if isinstance(one, QuantizedLinear | QuantizedConv2d)}
    if not layers:
        raise InputError(f"{str(folder)!r} holds no quantized layer; quantize the model first")
    pixels, source = draw(_shape(network)), deepcopy(model)
    before = means(source, list(layers), pixels)
    count = _change_quantizers(model, settings)
    order = list(before)
    for number, name in enumerate(order):
        _change_layer(model, source, name, before[name], settings, pixels)
        if progress is not None:
            progress(name, number + 1, len(order))
    write_network(network, output)
    true, found = logits(source, pixels), logits(model, pixels)
    report = {
        "schema": 1,
        "kind": "requantization",
        "source": network.name,
        "to": str(settings.spec),
        "output": str(output),
        "size_bytes": (output / "model.safetensors").stat().st_size,
        "source_size_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "layers": len(layers),
        "activations": count,
        "notes": [f"{name}: never called; it stays as it was" for name in layers if name not in before],
        "pictures": len(pixels),
        "difference": float(((found - true).square().mean() / true.var().clamp_min(1e-30)).sqrt()),
        "agreement": float((found.argmax(1) == true.argmax(1)).float().mean()),
    }
    write_json(report, output / "requantization.json")
    return report


def _shape(network: Network) -> tuple[int, ...]:
    if getattr(network.model, "main_input_name", None) != "pixel_values" or network.processor is None:
        raise InputError(f"{network.name}: models that read pictures and have an image processor can be requantized")
    pixels: Tensor = network.processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    return tuple(pixels.shape[1:])


def logits(model: nn.Module, pixels: Tensor) -> Float[Tensor, "n classes"]:
    """What the model says."""
    with torch.no_grad():
        found: Tensor = model(pixel_values=pixels).logits
    return found.double()


def means(model: nn.Module, names: list[str], pixels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """E[x] and E[x²] of the quantized inputs of layers by input channel, in the order of their calls."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in names:

        def hook(module: Any, args: Any, name: str = name) -> None:
            x = module.quantize_input(args[0]).double()
            x = x.transpose(1, -1) if isinstance(module, QuantizedConv2d) else x
            rows = x.reshape(-1, x.shape[-1])
            found.setdefault(name, (rows.mean(0), rows.square().mean(0)))

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        logits(model, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _change_quantizers(model: nn.Module, settings: Settings) -> int:
    """New grids for all activations, in place; returns how many there are."""
    count = 0
    for name, module in list(model.named_modules()):
        for key, quantizer in list(module.named_children()):
            if isinstance(module, QuantizedLinear | QuantizedConv2d | AttentionOperands) and isinstance(
                quantizer, ActivationQuantizer
            ):
                setattr(module, key, _changed(f"{name}.{key}", quantizer, settings))
                count += 1
    return count


def _changed(name: str, quantizer: ActivationQuantizer, settings: Settings) -> ActivationQuantizer:
    spec, target = quantizer.spec, settings.spec
    ends = covered_range(quantizer.scales, spec)
    if spec.kind != "int" or ends is None:
        raise InputError(f"{name}: {spec} has no range of a uniform grid; only those can be requantized")
    positive = settings.unsigned and ends[0] >= 0
    scale = activation_scale(*ends, target.bits, target.power_of_two, positive)
    grid = {"symmetry": "unsigned"} if positive else {"symmetry": "sym", "narrow": True}
    new = QuantSpec(bits=target.bits, granularity="tensor", power_of_two=target.power_of_two, **grid)
    zero = 0.0 if positive else float(2 ** (target.bits - 1))
    return ActivationQuantizer(new).set((torch.tensor(scale), torch.tensor(zero)))


def _change_layer(
    model: nn.Module, source: nn.Module, name: str, before: tuple[Tensor, Tensor], settings: Settings, pixels: Tensor
) -> None:
    layer, old = model.get_submodule(name), source.get_submodule(name)
    if not isinstance(layer, Layer) or not isinstance(old, Layer):
        raise InputError(f"{name} is a {type(layer).__name__}, not a quantized layer")
    weight = old.packed.qtensor().dequantize(torch.float64)
    first, second = (per_weight(old, part, weight.shape[1]) for part in before)
    stored = requantized_weight(weight, settings, second if settings.correct_weights else None)
    layer.packed = PackedWeight.of(stored)
    if settings.fold_errors:
        seen = per_weight(layer, means(model, [name], pixels)[name][0], weight.shape[1])
        bias = torch.zeros(len(weight)).double() if old.bias is None else old.bias.double()
        folded = folded_bias(bias, weight, stored.dequantize(torch.float64), first, seen)
        layer.bias = nn.Parameter(folded.to(old.dtype), requires_grad=False)


def per_weight(layer: Layer, values: Float[Tensor, " c"], columns: int) -> Float[Tensor, "r i"]:
    """A value of each input channel for each weight; a grouped convolution's rows read channels of their own."""
    groups = layer.groups if isinstance(layer, QuantizedConv2d) else 1
    inside = len(values) // groups
    rows = values.reshape(groups, inside).repeat_interleave(columns // inside, dim=1)
    return rows if groups == 1 else rows.repeat_interleave(layer.packed.shape[0] // groups, dim=0)


def requantized_weight(
    weight: Float[Tensor, "o i"], settings: Settings, second: Float[Tensor, "r i"] | None
) -> QTensor:
    """A weight on the target's grid, with scales in float32."""
    target, rows = settings.spec, weight.shape[0]
    channel = target.granularity == "channel"
    cells = weight if channel else weight.reshape(1, -1)
    importance = None
    if second is not None:
        importance = (second + 1e-9 * second.mean() + 1e-30).expand_as(weight).reshape(cells.shape)
    scale = weight_scale(cells, target.bits, target.power_of_two, importance).float()
    codes = weight_codes(cells, scale.double(), target.bits).reshape(weight.shape)
    spec = QuantSpec(
        bits=target.bits, granularity=target.granularity, narrow=True, power_of_two=target.power_of_two,
        scale_dtype="float32",
    )  # fmt: skip
    middle = 2 ** (target.bits - 1)
    steps = scale.reshape(rows if channel else 1, 1)
    return QTensor((codes.short() + middle).to(torch.uint8), Grid(spec, steps, torch.full_like(steps, float(middle))))
