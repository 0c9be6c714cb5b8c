"""Runs that can be interrupted: every finished unit is written at once, and a later run goes on behind it.

The folder `unfinished/` inside the output holds the run's fingerprint and two files a unit; the JSON, written last,
says that the unit is whole. A fingerprint of model, data and recipe refuses a resume that would mix two runs.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dither.errors import InputError, ResumeError
from dither.models.anatomy import Unit
from dither.models.structure import describe, rebuild
from dither.storage import write_json, write_tensors, writing
from dither.walk import Block, LayerRecord

FOLDER, FINGERPRINT = "unfinished", "fingerprint.json"


class Unfinished:
    """The finished units of a run, in `output/unfinished/`."""

    def __init__(self, output: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        """Start a run in an empty output folder, or go on with the one found there.

        Raises:
            InputError: the folder holds something and `resume` was not asked for.
            ResumeError: the run found there had another model, data or recipe.
        """
        self.folder = output / FOLDER
        check_output(output, resume)
        found = self._found()
        if found is None:
            if self.folder.is_dir() and any(self.folder.iterdir()) and resume:
                raise ResumeError(f"{str(self.folder)!r} holds no fingerprint; remove it and start again")
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_json(fingerprint, self.folder / FINGERPRINT)
        elif found != fingerprint:
            differing = sorted(key for key in found | fingerprint if found.get(key) != fingerprint.get(key))
            raise ResumeError(
                f"the unfinished run in {str(output)!r} had another {', '.join(differing)}; "
                "repeat its command, or choose another output"
            )

    def _found(self) -> dict[str, Any] | None:
        path = self.folder / FINGERPRINT
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ResumeError(f"{str(path)!r} cannot be read: {error}; remove the output and start again") from None

    def tensors(self, unit: Unit) -> Path:
        """The file of a finished unit's tensors, named as in the model's state."""
        return self.folder / f"{quote(unit.name, safe='')}.safetensors"  # a module's name may hold a slash

    def _paths(self, unit: Unit) -> tuple[Path, Path]:
        return self.tensors(unit), self.tensors(unit).with_suffix(".json")

    def write(self, block: Block) -> None:
        """Keep a finished block."""
        tensors, record = self._paths(block.unit)
        prefix = block.unit.name
        state = {f"{prefix}.{name}": x for name, x in block.module.state_dict().items()}
        write_tensors(state, tensors)
        data = {
            "structure": describe(block.module, prefix),
            "records": [asdict(one) for one in block.records],
            "operands": block.operand_records,
            "remarks": block.remarks,
            "sha256": _digest(tensors),
        }
        write_json(data, record)

    def restore(self, model: nn.Module, unit: Unit) -> dict[str, Any] | None:
        """Put a unit's earlier result into the model; returns its records, or None if there is none.

        Raises:
            ResumeError: the files are damaged.
        """
        tensors, record = self._paths(unit)
        if not record.is_file():
            return None
        try:
            data = json.loads(record.read_text())
            if data["sha256"] != _digest(tensors):
                raise ValueError(f"{tensors.name} holds other bytes than were written")
            device = next((x.device for x in model.get_submodule(unit.name).parameters()), None)
            rebuild(model, data["structure"])
            model.get_submodule(unit.name).to(device)
            state = load_file(tensors)
            missing = model.load_state_dict(state, strict=False)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ResumeError(f"{str(record)!r} is damaged: {error}; remove the output and start again") from None
        lacking = [key for key in missing.missing_keys if key.startswith(unit.name + ".")]
        if lacking or missing.unexpected_keys:
            raise ResumeError(f"{str(tensors)!r} does not fit: {(lacking + missing.unexpected_keys)[:3]}; start again")
        data["records"] = [LayerRecord(**_tuples(one)) for one in data["records"]]
        return dict(data)

    def remove(self) -> None:
        """The run is finished and saved elsewhere."""
        shutil.rmtree(self.folder)


def check_output(output: Path, resume: bool = False) -> None:
    """Refuse an output folder that holds something, before any work is done.

    Raises:
        InputError: it is a file, holds something else, or holds an unfinished run that `resume` does not ask for.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"output {str(output)!r} is a file; choose a folder")
    if not output.is_dir():
        return
    if (output / FOLDER / FINGERPRINT).is_file():
        if not resume:
            raise InputError(f"output {str(output)!r} holds an unfinished run; pass --resume to go on, or remove it")
    elif any(path.name != FOLDER for path in output.iterdir()):
        raise InputError(f"output {str(output)!r} is not empty; choose another folder or remove it")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(x) if isinstance(x, list) else x for key, x in record.items()}
