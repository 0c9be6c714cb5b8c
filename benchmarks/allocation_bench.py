"""What benchmarks/allocation.py runs on: a model, its answers, and score tables by allocator and calibration draw."""

import argparse
from pathlib import Path
from typing import Any

import torch

from dither.allocating import allocator_named
from dither.allocation.table import ScoreTable
from dither.data import TextSet, open_data
from dither.evaluation.exam import open_exam
from dither.models.network import open_network
from dither.sensitivity import measure

BASELINES = ("uniform", "random")
SAME = "judged=same"  # in a label: scores are of the samples that the solver was given, which flatter its weights
WIDTHS = (2, 3, 4, 5, 6, 8)
TEXT, PICTURES = "int{bits}:g64:asym:minmax", "int{bits}:channel:asym:percentile"


class Bench:
    """The full-precision model's answers, and score tables by allocator and calibration draw."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        network = open_network(given.model, given.device)
        self.name = network.name
        self.text = isinstance(open_data(given.evaluation), TextSet)
        self.exam = open_exam(network, given.evaluation, given.count).answered_by(network)
        self.format = given.format or (TEXT if self.text else PICTURES)
        self.options = [self.format.format(bits=bits) for bits in WIDTHS]
        self.tables: dict[tuple[str, str, int, bool], ScoreTable] = {}

    def table(self, allocator: str, seed: int) -> ScoreTable:
        """Measured, or read where it was kept."""
        name, scored = scored_by("error" if allocator in BASELINES else allocator)
        sensitivity = allocator_named(name).sensitivity
        same = SAME in allocator.split("+")
        key = sensitivity, scored, seed, same
        if key not in self.tables:
            self.tables[key] = measure(
                self.given.model, sensitivity, self.given.calibration, method=scored,
                judge_seed=seed if same else None, **self.asked(seed),
            )  # fmt: skip
        return self.tables[key]

    def asked(self, seed: int) -> dict[str, Any]:
        """How every allocator measures on a calibration draw."""
        given = self.given
        return {
            "options": self.options, "scores": given.scores, "count": given.samples, "seed": seed,
            "length": given.length if self.text else None, "batch_size": given.batch_size, "device": given.device,
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        given, cuda = self.given, self.given.device.startswith("cuda")
        return {
            "format": self.format,
            "samples": given.samples,
            "length": given.length if self.text else None,
            "calibration": Path(given.calibration).name,
            "evaluation": Path(given.evaluation).name,
            "count": self.exam.count,
            "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
            "torch": torch.__version__,
            **self.exam.facts(),
        }


def scored_by(label: str) -> tuple[str, str]:
    """An allocator with its settings, and the method whose weights its scores are of."""
    parts = [part for part in label.split("+") if part != SAME]
    methods = [part.removeprefix("method=") for part in parts if part.startswith("method=")]
    return "+".join(part for part in parts if not part.startswith("method=")), methods[-1] if methods else "rtn"
