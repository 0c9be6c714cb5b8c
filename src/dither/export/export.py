"""export: a quantized network in the form that another runtime opens, read back and compared before it counts."""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dither.errors import DependencyError, DitherError, InputError, SpecError, StorageError, nearest
from dither.export.answers import compare_answers
from dither.export.source import Source, open_source
from dither.export.written import Written
from dither.result import Result
from dither.unfinished import check_output

logger = logging.getLogger(__name__)
TARGETS = {
    "compressed-tensors": ("compressed_tensors", "write"),
    "gptq": ("gptq", "write"),
    "gptq-v2": ("gptq", "write_v2"),
    "gguf": ("gguf", "write"),
    "onnx": ("onnx", "write"),
    "onnx-qdq": ("qdq", "write"),
    "dequantized": ("dequantized", "write"),
    "peft": ("peft", "write"),
}
QDQ = "onnx-qdq"
Progress = Callable[[str, int, int], None]  # (layer, layers read back, in all)


def export(
    result: Result | str | Path,
    to: str,
    output: str | Path,
    *,
    dtype: str = "auto",
    data: str | Path | None = None,
    calibration: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a result, or the folder that one was saved in, for another runtime; returns what was written.

    `to` is compressed-tensors (vLLM, SGLang, transformers), gptq or gptq-v2, gguf (llama.cpp), onnx (ONNX Runtime,
    weights in a few bits) or onnx-qdq (vision models with integer products), dequantized (16-bit weights for any
    program) or peft (low-rank terms as an adapter). `dtype` is that of scales and
    of what was kept; `auto` rounds no scale. Every weight is decoded from the file by a reader of its own and compared
    with the result. `data` are pictures on which the runtime's answers are compared with dither's, `calibration` those
    that give residual sums of convolutions ranges, so that these are computed with integers as well (both onnx-qdq).

    Raises:
        SpecError, InputError: the target cannot hold a layer; the message names it, the reason and what to do instead.
        DependencyError: the target needs a package that is not installed.
        StorageError: writing failed, or what was read back differs; nothing is left behind then.
    """
    if to not in TARGETS:
        raise InputError(f"expected to export to one of {', '.join(TARGETS)}, got {to!r}{nearest(to, TARGETS)}")
    if calibration is not None and to != QDQ:
        raise InputError(f"calibration gives ranges to the sums of an export to {QDQ}; {to} stores none")
    folder = Path(output)
    check_output(folder)
    existed, source = folder.exists(), open_source(result)
    if not source.layers:
        raise InputError(f"{source.name} holds no quantized layer: there is nothing to export")
    _refuse_offsets(source, to)
    try:
        ranges = {} if calibration is None else {"calibration": calibration}
        written = _writer(to)(source, folder, dtype, **ranges)
        compared = compare(source, written, progress)
        compared |= {} if data is None else {"pictures": compare_answers(source, written, to, data)}
    except BaseException:
        _remove(folder, existed)
        raise
    return {
        "schema": 1,
        "kind": "export",
        "to": to,
        "source": source.name,
        "output": str(folder),
        "files": [{"name": name, "size_bytes": (folder / name).stat().st_size} for name in sorted(written.files)],
        "size_bytes": sum((folder / name).stat().st_size for name in written.files),
        "dtype": str(written.dtype).removeprefix("torch."),
        "opens_with": written.opens_with,
        "notes": written.notes,
        **compared,
    }


def _refuse_offsets(source: Source, to: str) -> None:
    """An offset that is added before an input is rounded is taken back by the bias: neither may be left out."""
    for name, entry in source.layers.items():
        if "offset" in (entry["activations"] or {}):
            raise SpecError(
                f"{name}: {to} cannot hold the vector that is added to its input; open the folder with from_pretrained "
                "after `import dither`, or use a method without one"
            )


def _writer(to: str) -> Callable[..., Written]:
    module, function = TARGETS[to]
    try:
        writer: Callable[..., Written] = getattr(import_module(f"dither.export.{module}"), function)
    except ImportError as error:
        if isinstance(error, DitherError):
            raise
        raise DependencyError(f"exporting to {to} needs {error.name}; install dither[export]") from error
    return writer


def compare(source: Source, written: Written, progress: Progress | None = None) -> dict[str, Any]:
    """Decode what was written, tensor by tensor, and compare it with the source.

    Raises:
        StorageError: a value differs by more than its rounding to the file's type; the message names the tensor.
    """
    largest, exact = 0.0, 0
    for number, name in enumerate(source.layers):
        true, found = source.weight(name).dequantize().numpy(), written.weight(name)
        if found.shape != true.shape:
            raise StorageError(f"{name} was read back with shape {found.shape} instead of {true.shape}")
        change = np.abs(found.astype(np.float64) - true)
        if not bool((change <= written.bound(name)).all()):
            raise StorageError(f"{name}: the weight was read back different, by up to {float(change.max()):.3g}")
        exact += int(not change.any())
        size = float(np.abs(true).max())
        largest = max(largest, float(change.max()) / size if size > 0 else 0.0)
        if progress is not None:
            progress(name, number + 1, len(source.layers))
    kept = 0
    for name, tensor in source.kept():
        found_tensor = written.kept(name)
        if found_tensor is None:
            continue
        expected = tensor.to(found_tensor.dtype)
        if found_tensor.shape != expected.shape or not bool(found_tensor.equal(expected)):
            raise StorageError(f"{name} was read back different")
        kept += 1
    return {"layers": len(source.layers), "exact_layers": exact, "largest_change": largest, "kept_tensors": kept}


def _remove(folder: Path, existed: bool) -> None:
    """Leave nothing that looks finished; a folder that was there, empty, stays."""
    with suppress(OSError):
        for path in folder.iterdir() if existed else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            shutil.rmtree(folder)
