"""inspect: what a folder holds; of a quantized model its report, of any other model its parts as dither sees them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dither.data.processing import pixel_values
from dither.errors import InputError
from dither.models.anatomy import Anatomy, read_anatomy
from dither.models.coverage import coverage
from dither.models.layers import is_layer, matrix_shape
from dither.models.network import Network, open_network, read_config
from dither.nn.experts import unfuse
from dither.report.data import read_report
from dither.walk import walk

_TOKENS = 8  # length of the made-up text that a language model is probed with


def inspect(folder: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The report data of a folder that dither wrote, or the parts of a full-precision model (kind `inspect`).

    Raises:
        PathError, InputError: there is neither, or it cannot be read.
    """
    place = Path(folder)
    if (place / "report.json").is_file():
        return read_report(place)
    if "quantization_config" in read_config(place):
        raise InputError(f"{str(folder)!r} is quantized, but its report.json is missing; quantize again to have one")
    return describe(open_network(place, device))


def describe(network: Network) -> dict[str, Any]:
    """Units, layers, links and kept parts of a full-precision model, found by one pass over made-up input.

    Where no input can be made up, layers are listed as the model holds them, `probe` is null and no unit is known.
    """
    model = network.model
    unfuse(model)
    data = {
        "schema": 1,
        "kind": "inspect",
        "model": {
            "name": network.name,
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "source": network.name if network.source is None else str(network.source),
        },
        "size_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    found = _made_up(network)
    if found is None:
        layers = [_layer(model, name, "") for name, module in model.named_modules() if is_layer(module)]
        return {**data, "probe": None, "units": [], "layers": layers, "links": [], "unlinked": {}, "coverage": []}
    probe, batch = found
    anatomy = read_anatomy(model, lambda: network.run(batch))
    owner = {name: unit.name for unit in anatomy.units for name in unit.layers}
    links, unlinked = _links(network, anatomy, batch)
    remarks = dict.fromkeys(anatomy.layers, "can be quantized")
    return {
        **data,
        "probe": probe,
        "units": [
            {"name": u.name, "is_block": u.is_block, "layers": list(u.layers), "attention": list(u.attention)}
            for u in anatomy.units
        ],
        "layers": [_layer(model, name, owner[name]) for name in anatomy.layers],
        "links": links,
        "unlinked": unlinked,
        "coverage": coverage(model, anatomy.kept, remarks),
    }


def _layer(model: nn.Module, name: str, unit: str) -> dict[str, Any]:
    layer = model.get_submodule(name)
    shape = list(matrix_shape(layer)) if is_layer(layer) else []
    parameters = sum(p.numel() for p in layer.parameters())
    return {"name": name, "unit": unit, "kind": type(layer).__name__, "shape": shape, "parameters": parameters}


def _made_up(network: Network) -> tuple[str, Any] | None:
    """An input that the model runs on and what it is: a noise picture, or a few tokens."""
    tried: list[tuple[str, Any]] = []
    if network.processor is not None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        tried.append(("a noise picture", pixel_values(network.processor, [Image.fromarray(noise)], network.channels)))
    elif isinstance(size := network.config.get("image_size"), int):
        generator = torch.Generator().manual_seed(0)
        tried.append(("a noise picture", torch.randn(1, network.channels, size, size, generator=generator)))
    if isinstance(words := network.config.get("vocab_size"), int):
        tried.append(("made-up tokens", {"input_ids": torch.arange(_TOKENS).remainder(words)[None]}))
    for what, batch in tried:
        moved: Any = batch
        if isinstance(batch, torch.Tensor):
            moved = batch.to(network.device)
        else:
            moved = {name: x.to(network.device) for name, x in batch.items()}
        try:
            with torch.no_grad():
                network.run(moved)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        return what, moved
    return None


def _links(network: Network, anatomy: Anatomy, batch: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Which norm feeds which layers, and for the other norms why they feed none."""
    links: list[dict[str, Any]] = []
    unlinked: dict[str, str] = {}
    with torch.no_grad():
        for block in walk(network.model, anatomy, network.run, [batch], "fp"):
            if block.unit.is_block:
                found = block.links()
                links += [{"norm": link.norm, "layers": list(link.layers)} for link in found.found]
                unlinked |= found.refused
    return links, unlinked
