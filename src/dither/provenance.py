"""What a result was made from: versions, hashes, seed, device."""

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from dither.data.calibration import Calibration
from dither.errors import NonFiniteError


def model_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash over names, types and bytes of all tensors of a model's state.

    Raises:
        NonFiniteError: a parameter holds NaN or Inf; the message names it.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name} holds NaN or Inf; repair or re-download the model")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def software(device: torch.device) -> dict[str, str]:
    """The versions and the kind of device that decide a result to the last bit."""
    return {
        "dither": version("dither"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": device.type,
    }


def provenance(sha256: str, calibration: Calibration, seed: int, device: torch.device) -> dict[str, Any]:
    """Everything that decides a result besides the recipe."""
    return {
        **software(device),
        "python": platform.python_version(),
        "seed": seed,
        "model_sha256": sha256,
        "calibration": {"sha256": calibration.sha256, "count": calibration.count, "source": calibration.source},
    }
