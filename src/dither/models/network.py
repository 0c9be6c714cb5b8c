"""A network to work on: the module, where it came from, how to call it, how its pictures are prepared."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dither.data import ImageProcessor, default_processor, load_processor
from dither.errors import DependencyError, InputError, PathError, StorageError
from dither.models.structure import rebuild

CONFIG, WEIGHTS = "config.json", "model.safetensors"
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

    def run(self, batch: Any) -> Any:
        """Call the model on a batch: a tensor, a tuple of arguments or a dict of named ones.

        A cache of keys and values is switched off: a block that runs several times on the same inputs would fill it.
        """
        options = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
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
        files = [] if self.source is None else list(self.source.glob("*.safetensors"))
        in_memory = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return sum(file.stat().st_size for file in files) or in_memory

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


def open_network(
    model: str | Path | nn.Module, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Network:
    """A network from a Hugging Face or timm folder, a folder that dither wrote, or a module in memory.

    Raises:
        PathError: there is no such folder.
        InputError: the folder is not a model that can be read.
    """
    if isinstance(model, nn.Module):
        return _from_module(model)
    folder = Path(model)
    config = read_config(folder)
    if not {"model_type", "architecture"} & set(config):
        raise InputError(f"{str(folder)!r} holds a {config.get('class')}: load it with dither.load(folder, into=model)")
    loaded = _load_timm(folder, config) if "architecture" in config else _load_transformers(folder, config, dtype)
    loaded = loaded.to(device).eval()
    if not (folder / "preprocessor_config.json").exists():
        return Network(loaded, folder.resolve().name, folder, _timm_processor(loaded), load_tokenizer(folder))
    return Network(loaded, folder.resolve().name, folder, load_processor(folder), load_tokenizer(folder))


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
    load_state(model, _read_state(folder), str(folder))
    model.config = dict(config)  # type: ignore[assignment]
    return model


def load_into(model: nn.Module, folder: Path) -> nn.Module:
    """Fill a full-precision instance of the stored class from the folder, in place; returns it in evaluation mode."""
    config = read_config(folder)
    if "quantization_config" in config:
        rebuild(model, config["quantization_config"])
    load_state(model, _read_state(folder), str(folder))
    return model.eval()


def _read_state(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{str(folder / WEIGHTS)!r} cannot be read: {error}") from None


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
    for name, x in model.state_dict().items():
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype) if x.numel() and x.device.type != "meta" else (name,)
        names[name] = first.setdefault(key, name)
    return names


def _timm_processor(model: nn.Module) -> ImageProcessor | None:
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(settings, Mapping) or "mean" not in settings:
        return None
    return default_processor(tuple(settings["input_size"][1:]), settings["mean"], settings["std"])
