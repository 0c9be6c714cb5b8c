"""What is exported: a quantized network, read from its folder or from a result in memory, tensor by tensor."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import InputError
from dither.formats.qtensor import QTensor
from dither.models.checkpoint import Checkpoint
from dither.models.network import CONFIG, Network, read_config
from dither.models.structure import Structure, describe, read_layout
from dither.result import Result

_INSIDE = ("packed", "input_quantizer", "attention_operands")  # children of a quantized module that hold its tensors


@dataclass(frozen=True)
class Source:
    """A quantized network as data: nothing is in memory but what `read` is asked for.

    `config` is config.json without the quantization, `structure` that of `dither.models.structure`, `names` all stored
    tensors; `folders` are where files beside the tensors (tokenizer, …) may be found, the nearest first.
    """

    name: str
    config: Mapping[str, Any]
    structure: Structure
    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    folders: tuple[Path, ...]

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """The structure's entry of each quantized layer, by module name."""
        return dict(self.structure["layers"])

    def weight(self, layer: str) -> QTensor:
        """The stored weight of a quantized layer."""
        entry, prefix = self.layers[layer], f"{layer}.packed."
        parts = {name.removeprefix(prefix): self.read(name) for name in self.names if name.startswith(prefix)}
        return QTensor.unpack(parts, read_layout(entry))

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Everything that is not part of a quantizer, biases of quantized layers included."""
        return tuple(name for name in self.names if not any(f".{part}." in name for part in _INSIDE))

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of what `kept_names` lists."""
        yield from ((name, self.read(name)) for name in self.kept_names)


def open_source(result: Result | str | Path) -> Source:
    """A network to export from a result, or from the folder that one was saved in.

    Raises:
        PathError, InputError: there is no such folder, or dither did not write it.
        StorageError: it cannot be read.
    """
    if isinstance(result, Result):
        return _from_network(result.network)
    folder = Path(result)
    config = read_config(folder)
    structure = config.pop("quantization_config", {})
    if structure.get("quant_method") != "dither":
        raise InputError(f"{str(folder)!r} was not written by dither quantize: its config.json does not name dither")
    stored = Checkpoint.of_folder(folder)
    origin = _origin(folder)
    folders = (folder,) if origin is None else (folder, origin)
    return Source(folder.resolve().name, config, structure, tuple(stored.places), stored.read, folders)


def _from_network(network: Network) -> Source:
    config = {key: value for key, value in network.config.items() if key != "quantization_config"}
    if "model_type" in config:
        config["architectures"] = [type(network.model).__name__]
    folders = () if network.source is None else (network.source,)
    return Source(
        network.name, config, describe(network.model), tuple(network.sizes()),
        lambda name: network.tensor(name).detach().cpu(), folders,
    )  # fmt: skip


def _origin(folder: Path) -> Path | None:
    """The folder that the network was made from, if the report names one that is still there."""
    try:
        place = json.loads((folder / "report.json").read_text())["model"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(place) if isinstance(place, str) and (Path(place) / CONFIG).is_file() else None


def skeleton(source: Source) -> nn.Module:
    """The architecture of the network in full precision, without memory for its weights.

    Raises:
        InputError: it is not an architecture of transformers.
    """
    import transformers
    from accelerate import init_empty_weights

    named = [getattr(transformers, name, None) for name in source.config.get("architectures") or []]
    kind = next((kind for kind in named if kind is not None), None)
    if kind is None or "model_type" not in source.config:
        raise InputError(f"{source.name} is no architecture of transformers; exports need one")
    config = kind.config_class.from_dict(dict(source.config))
    with init_empty_weights(include_buffers=False):
        model: nn.Module = kind(config)
    return model.eval()


def unfolded(source: Source, model: nn.Module) -> Source:
    """The network with its batch normalizations again, which pass on what they get and add the layers' new biases.

    A plain architecture has no other place for the bias that folding gave a layer.
    """
    folded = source.structure.get("folded", {})
    made: dict[str, Tensor] = {}
    moved: set[str] = set()
    for name, layer in folded.items():
        norm = model.get_submodule(name)
        made |= {f"{name}.{key}": _neutral(key, x, norm) for key, x in norm.state_dict().items()}
        if getattr(model.get_submodule(layer), "bias", None) is None and f"{name}.bias" in made:
            made[f"{name}.bias"] = source.read(f"{layer}.bias")
            moved.add(f"{layer}.bias")
    structure = {key: part for key, part in source.structure.items() if key != "folded"}
    names = tuple(name for name in source.names if name not in moved) + tuple(made)
    read = source.read
    return replace(
        source, structure=structure, names=names, read=lambda name: made[name] if name in made else read(name)
    )


def _neutral(key: str, like: Tensor, norm: nn.Module) -> Tensor:
    """What makes a normalization put out its input."""
    dtype = like.dtype
    if key == "running_var":
        return torch.full(like.shape, 1 - float(getattr(norm, "eps", 1e-5)), dtype=dtype)
    return torch.full(like.shape, float(key == "weight"), dtype=dtype)
