"""The best trial of a search, quantized again into a folder, and the command that does the same."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dither.errors import ResumeError
from dither.pipeline import quantize
from dither.quantune.bench import Bench
from dither.quantune.data import TuningData
from dither.recipe import parse_method
from dither.tuning.trial import Task
from dither.unfinished import FOLDER as UNFINISHED

BEST = "best"


def save_winner(
    bench: Bench, task: Task, sets: TuningData, folder: Path, progress: Callable[[str, int, int], None] | None
) -> dict[str, Any]:
    """Quantize the task's model into `folder/best`, unless the very same is there; tested where there is test data.

    Returns what the report says of it: where it is, its test, and the command that makes it again.
    """
    method, place = parse_method(task.method, task.fields), folder / BEST
    facts: dict[str, Any] = {"folder": str(place), "command": command(bench, task, sets, place)}
    network, _ = bench.open()
    model = network.model if isinstance(bench.model, nn.Module) else bench.model
    options: dict[str, Any] = {
        "count": task.samples, "seed": task.seed, "length": bench.length, "device": bench.device, "progress": progress,
        "evaluation": sets.test,
    }  # fmt: skip
    unfinished = (place / UNFINISHED).is_dir()
    if place.exists() and not unfinished:
        shutil.rmtree(place)  # the best of fewer trials
    try:
        result = quantize(model, method, sets.calibration, output=place, resume=unfinished, **options)
    except ResumeError:  # it was of another trial
        shutil.rmtree(place)
        result = quantize(model, method, sets.calibration, output=place, **options)
    return {**facts, "test": result.report.data["evaluation"]}


def command(bench: Bench, task: Task, sets: TuningData, place: Path) -> str | None:
    """What to type to make the result again; None where model or data are not on disk."""
    if isinstance(bench.model, nn.Module) or sets.place is None:
        return None
    words = ["dither", "quantize", str(bench.model), "--recipe", str(place / "recipe.yaml")]
    words += ["--calibration", sets.place, "--samples", str(task.samples), "--seed", str(task.seed)]
    words += [] if bench.length is None else ["--length", str(bench.length)]
    return shlex.join([*words, "-o", "again"])
