"""Problem: what a search is about, that is, the model, what may be chosen for it, the objective and the data."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

from dither.data.calibration import LENGTH, Calibration, prepare_calibration
from dither.methods import RTN
from dither.models.features import model_features
from dither.models.network import Network
from dither.provenance import provenance
from dither.quantune.bench import Bench
from dither.quantune.choices import Choices
from dither.quantune.data import TuningData
from dither.run import Run
from dither.tuning.objective import Limit, Objective
from dither.tuning.space import Dimension, Space, Value


@dataclass
class Problem:
    """`features` are of the model, `reference` has the figures of full precision, `facts` is the provenance."""

    bench: Bench
    sets: TuningData
    choices: Choices
    space: Space
    aim: Objective
    model: dict[str, Any]
    features: dict[str, float]
    reference: dict[str, float | None]
    facts: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "objective": self.aim.name, "limits": [asdict(limit) for limit in self.aim.limits],
            "calibration": self.sets.calibration.source, "data": self.sets.data.source,
            "judged by": self.bench.open()[1].count, "length": self.bench.length, "configurations": len(self.space),
            "space": {one.name: list(one.values) for one in self.space.dimensions},
        }  # fmt: skip

    def header(self, strategy: Mapping[str, Any]) -> dict[str, Any]:
        """The journal's header; `strategy` is what must be the same besides the problem for a search to go on."""
        settings = self.settings()
        fingerprint = {
            "model": self.facts["model_sha256"],
            **self.sets.digests(),
            "objective or limits": [settings["objective"], settings["limits"]],
            "space": settings["space"],
            "evaluation": [settings["judged by"], settings["length"]],
            "software or device": {key: self.facts[key] for key in ("dither", "torch", "transformers", "device")},
            **strategy,
        }
        return {
            "fingerprint": fingerprint, "model": self.model, "features": self.features, "reference": self.reference,
            "objective": self.aim.name,
        }  # fmt: skip


def pose(
    bench: Bench, sets: TuningData, objective: str | None, limits: Sequence[Limit], samples: Sequence[Value] | None,
    dimensions: Callable[[Sequence[int]], Sequence[Dimension]], seed: int,
) -> Problem:  # fmt: skip
    """Open the model, ask it the questions, and find out what may be chosen; `dimensions` are of the sample numbers.

    Raises:
        InputError: the data do not give the objective, or nothing fits the model.
    """
    network, exam = bench.open()
    reference = bench.reference()
    aim = Objective(objective or _usual(exam.facts()), tuple(limits))
    aim.check(reference)
    wanted = dimensions(sets.samples(samples, network, bench.length))
    own = replace(network, model=deepcopy(network.model))  # a run prepares it: normalizations folded, experts apart
    run = Run(own, RTN(), _one_batch(sets, network, seed, bench.length))
    choices = Choices(own.model, run.anatomy)
    space = choices.space(wanted, next((limit.bound for limit in limits if limit.name == "size"), None))
    model = {"name": network.name, "class": type(network.model).__name__, "parameters": run.parameters}
    facts = provenance(run.sha256, run.data, seed, network.device)
    features = model_features(own.model, run.anatomy)
    return Problem(bench, sets, choices, space, aim, model, features, reference, facts)


def _usual(facts: Mapping[str, float | None]) -> str:
    """The objective where none was named."""
    return next((name for name, key in (("accuracy", "top1"), ("perplexity", "perplexity")) if facts.get(key)), "kl")


def _one_batch(sets: TuningData, network: Network, seed: int, length: int | None) -> Calibration:
    """A single picture or sequence, to find out what the network is made of."""
    return prepare_calibration(
        sets.calibration, network.processor, network.channels, 1, seed, 1, network.device, network.tokenizer,
        min(LENGTH, network.context) if length is None else length,
    )  # fmt: skip
