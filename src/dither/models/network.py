"""A network to work on: the module, where it came from, how to call it, how its pictures are prepared."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dither.data import ImageProcessor, default_processor, load_processor
from dither.errors import DependencyError, InputError, PathError, StorageError
from dither.models.checkpoint import WEIGHTS as WEIGHTS  # noqa: PLC0414  # mypy wants the alias to pass a name on
from dither.models.checkpoint import Checkpoint
from dither.models.skeleton import fitted, skeleton
from dither.models.streaming import Streamed, state_tensor
from dither.models.structure import rebuild
from dither.nn.experts import unfuse

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
_AUTOMATIC = (
    "AutoModelForImageClassification",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForObjectDetection",
    "AutoModelForSemanticSegmentation",
    "AutoModel",
)


@dataclass
class Network:
    """A model in evaluation mode and what is known about it."""

    model: nn.Module
    name: str
    source: Path | None = None
    processor: ImageProcessor | None = None
    tokenizer: Any | None = None
    weights: Streamed | None = None  # where a model larger than memory has its parts from

    def run(self, batch: Any, whole: bool = True) -> Any:
        """Call the model on a batch: a tensor, a tuple of arguments or a dict of named ones.

        A cache of keys and values is switched off: a block that runs several times on the same inputs would fill it.
        Not `whole`, a language model gives the logits of the last token alone.
        """
        known, options = inspect.signature(self.model.forward).parameters, dict[str, Any]()
        if "use_cache" in known:
            options["use_cache"] = False
        if not whole and "logits_to_keep" in known:
            options["logits_to_keep"] = 1
        if isinstance(batch, Mapping):
            return self.model(**options | dict(batch))
        return self.model(*batch, **options) if isinstance(batch, tuple | list) else self.model(batch, **options)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration as plain data; empty for a plain module."""
        config = getattr(self.model, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            return dict(config.to_dict())
        return dict(config) if isinstance(config, Mapping) else {}

    @property
    def label2id(self) -> dict[str, int]:
        """Class names and their numbers, as far as known."""
        return {str(name): int(index) for name, index in self.config.get("label2id", {}).items()}

    @property
    def channels(self) -> int:
        """Channels of the pictures the model expects."""
        return int(self.config.get("num_channels", 3))

    @property
    def context(self) -> int:
        """Tokens that a language model reads at most; practically endless where its configuration does not say."""
        return int(self.config.get("max_position_embeddings") or self.config.get("n_positions") or 2**31)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights where they came from: the folder's files, else the tensors in memory."""
        try:
            return Checkpoint.of_folder(self.source).nbytes if self.source is not None else self.resident_bytes
        except StorageError:  # other files than safetensors
            return self.resident_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters in memory: all, or what stays there beside the blocks of a streamed model."""
        in_memory = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return in_memory if self.weights is None else self.weights.resident_bytes

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        if self.weights is not None:
            return self.weights.device
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor to store, without second names of one, which safetensors refuses and loading ties."""
        if self.weights is not None:
            self.weights.release()
        first = first_names(self.model)
        return {name: x.nbytes for name, x in self.model.state_dict().items() if first[name] == name}

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model's state, wherever it is."""
        return state_tensor(self.model, name) if self.weights is None else self.weights.read(name)

    def module(self, name: str) -> nn.Module:
        """A module of the model, with its tensors in memory until another one is asked for."""
        if self.weights is not None:
            self.weights.load_holder(name)
        return self.model.get_submodule(name)

    def load(self, part: str) -> None:
        """Have a part's tensors in memory; those of another one may go."""
        if self.weights is not None:
            self.weights.load(part)

    def stored(self, part: str, path: Path) -> None:
        """A part has changed and its tensors lie in a file now."""
        if self.weights is not None:
            self.weights.stored(part, Checkpoint.of_files([path]))

    def saved(self, folder: Path) -> None:
        """All parts come from this folder now."""
        if self.weights is not None:
            self.weights.release()
            self.weights.checkpoint = Checkpoint.of_folder(folder).renamed(first_names(self.model))

    @contextmanager
    def by_hand(self, parts: Sequence[str]) -> Iterator[None]:
        """While open, `load` is called for these parts before they are."""
        with nullcontext() if self.weights is None else self.weights.by_hand(parts):
            yield

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's state, one tensor at a time."""
        if self.weights is None:
            yield from self.model.state_dict().items()
        else:
            yield from ((name, self.weights.read(name)) for name in self.model.state_dict())


def open_network(
    model: str | Path | nn.Module,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stream: bool = False,
) -> Network:
    """A network from a Hugging Face or timm folder, a folder that dither wrote, or a module in memory.

    With `stream`, blocks stay in the folder's files until they are used.

    Raises:
        PathError: there is no such folder.
        InputError: the folder is not a model that can be read, or not one that can be streamed.
    """
    if isinstance(model, nn.Module):
        return _from_module(model)
    folder = Path(model)
    config = read_config(folder)
    if not {"model_type", "architecture"} & set(config):
        raise InputError(f"{str(folder)!r} holds a {config.get('class')}: load it with dither.load(folder, into=model)")
    weights = _stream_transformers(folder, config, device, dtype) if stream else None
    if weights is not None:
        loaded = weights.model
    else:
        loaded = _load_timm(folder, config) if "architecture" in config else _load_transformers(folder, config, dtype)
        loaded = loaded.to(device).eval()
    stored = (folder / "preprocessor_config.json").exists()
    processor = load_processor(folder) if stored else _timm_processor(loaded)
    return Network(loaded, folder.resolve().name, folder, processor, load_tokenizer(folder), weights)


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None where there is none.

    Raises:
        InputError: it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, checked to be one."""
    if not folder.exists():
        raise PathError(f"model folder {str(folder)!r} does not exist")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{str(folder)!r} is not a model folder: it has no {CONFIG}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{str(folder / CONFIG)!r} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict) or not {"model_type", "architecture", "quantization_config"} & set(config):
        raise InputError(f"{str(folder / CONFIG)!r} names no model_type (transformers) or architecture (timm)")
    return config


def _from_module(model: nn.Module) -> Network:
    place = getattr(getattr(model, "config", None), "_name_or_path", "")
    folder = Path(place) if place and Path(place).is_dir() else None
    name = folder.resolve().name if folder is not None else type(model).__name__
    has_processor = folder is not None and (folder / "preprocessor_config.json").exists()
    processor = load_processor(folder) if has_processor and folder is not None else _timm_processor(model)
    return Network(model, name, folder, processor, None if folder is None else load_tokenizer(folder))


def _load_transformers(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    lacking = ""
    for kind in _classes(folder, config):
        model, missing = _from_pretrained(kind, folder, dtype)
        if not missing:
            return model
        lacking = lacking or f"lacks {len(missing)} weights of {kind.__name__}, among them {missing[0]}"
    raise InputError(f"{str(folder)!r} {lacking}")


def _stream_transformers(
    folder: Path, config: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype
) -> Streamed:
    if "model_type" not in config or "quantization_config" in config:
        raise InputError(f"{str(folder)!r} cannot be read block by block: only full-precision transformers models can")
    checkpoint, lacking = Checkpoint.of_folder(folder), ""
    for kind in _classes(folder, config):
        model = skeleton(kind, folder, dtype)
        try:
            found = fitted(checkpoint, model, "it")
        except InputError as error:
            lacking = lacking or str(error)
            continue
        unfuse(model)
        return Streamed(model, found, device)
    raise InputError(f"{str(folder)!r} cannot be read block by block: {lacking}")


def _classes(folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """The class that the configuration names, else the automatic classes that know its model type."""
    import transformers

    named = [getattr(transformers, name, None) for name in config.get("architectures") or []]
    if any(named):
        return [kind for kind in named if kind is not None]
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{str(folder)!r}: transformers {transformers.__version__} cannot read it: {error}") from None
    automatic = [getattr(transformers, name) for name in _AUTOMATIC]
    return [kind for kind in automatic if type(settings) in kind._model_mapping]


def _from_pretrained(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{str(folder)!r} cannot be loaded as {kind.__name__}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model, sorted(info["missing_keys"])


def _load_timm(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise DependencyError(f"{str(folder)!r} is a timm model; install dither[timm] ({error})") from error
    model: nn.Module = timm.create_model(
        config["architecture"],
        pretrained=False,
        num_classes=config.get("num_classes", 1000),
        **config.get("model_args", {}),
    )
    if "quantization_config" in config:
        rebuild(model, config["quantization_config"])
    load_state(model, Checkpoint.of_folder(folder).read_all(), str(folder))
    model.config = dict(config)  # type: ignore[assignment]
    return model


def load_into(model: nn.Module, folder: Path) -> nn.Module:
    """Fill a full-precision instance of the stored class from the folder, in place; returns it in evaluation mode."""
    config = read_config(folder)
    if "quantization_config" in config:
        rebuild(model, config["quantization_config"])
    load_state(model, Checkpoint.of_folder(folder).read_all(), str(folder))
    return model.eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load tensors strictly; a tensor that the model has under several names is stored under the first.

    Raises:
        StorageError: names or shapes differ.
    """
    tied = {name: state[first] for name, first in first_names(model).items() if first in state}
    try:
        model.load_state_dict({**tied, **state}, strict=True)
    except RuntimeError as error:
        raise StorageError(f"{where} does not fit {type(model).__name__}: {error}") from None


def first_names(model: nn.Module) -> dict[str, str]:
    """For each name in the model's state, the first name of the same tensor: another one where weights are tied."""
    first: dict[tuple[Any, ...], str] = {}
    names = {}
    for name, x in model.state_dict(keep_vars=True).items():
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype) if x.numel() and x.device.type != "meta" else (id(x),)
        names[name] = first.setdefault(key, name)
    return names


def _timm_processor(model: nn.Module) -> ImageProcessor | None:
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(settings, Mapping) or "mean" not in settings:
        return None
    return default_processor(tuple(settings["input_size"][1:]), settings["mean"], settings["std"])
