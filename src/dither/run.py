"""A quantization in progress: the network being walked, what has been recorded so far, and the report made of it."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from dither.data.calibration import Calibration, one_sample
from dither.engine.local import Engine
from dither.engine.team import ALONE, Team
from dither.errors import InputError
from dither.methods.base import Method
from dither.models.anatomy import Anatomy, Unit, read_anatomy
from dither.models.batchnorm import few, fold_batch_norms, is_batch_norm
from dither.models.coverage import coverage
from dither.models.gradients import NOT_RESIDENT, Gradients
from dither.models.network import Network
from dither.models.preparing import Prepared, Subject
from dither.models.selection import matching, without
from dither.nn.experts import unfuse
from dither.planning import SPILL_BUDGET, check_formats, make_plan, memory, sizes_seen
from dither.provenance import model_sha256
from dither.recipe import resolved
from dither.runtime_rules import findings
from dither.unfinished import Unfinished
from dither.walk import Block, LayerRecord, walk

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # (what, units or pictures done, in all)
NOT_SHARED = (
    "it needs samples of all calibration batches at hand, but ranks share them; "
    "run it in one process, with --workers or --engine ray"
)


class Run:
    """One quantization of a network with a method on calibration data."""

    def __init__(
        self,
        network: Network,
        method: Method,
        data: Calibration,
        progress: Progress | None = None,
        team: Team = ALONE,
        prepare: Callable[[Subject], Prepared] | None = None,
    ) -> None:
        """Run the network once, to find out what it is made of, and prepare it as the method wants.

        `team` are the ranks that share the batches of the walk; `prepare` is the method's own, if not given.

        Raises:
            InputError: the method cannot be used on this network, or not by several ranks.
        """
        self.network, self.recipe, self.method, self.data, self.team = network, method, method, data, team
        self.unfinished: Unfinished | None = None
        self.progress = progress
        self.facts: dict[str, Any] = {}  # for the report, by their names there
        self.original_bytes = network.stored_bytes
        self.parameters = sum(p.numel() for p in network.model.parameters())
        self.records: list[LayerRecord] = []
        self.operands: list[dict[str, Any]] = []
        self.remarks: dict[str, str] = {}
        self.done, self.expected = 0, 0
        unfuse(network.model)
        if method.takes_gradients and network.weights is not None:
            raise InputError(f"{method.name}: {NOT_RESIDENT}")
        if team.size > 1 and not method.shards:
            raise InputError(f"{method.name}: {NOT_SHARED}")
        self.sha256 = team.agree(lambda: model_sha256(network.tensors()))  # of the model as it was given; refuses NaN
        if method.fold_norms:
            self.remarks |= self._fold()
        sample, samples = one_sample(data.batches[0])
        with sizes_seen(network.model) as sizes:
            self.anatomy = self._read(sample)
        self.sizes = sizes.scaled(samples)
        self._prepare(prepare or method.prepare)

    def _prepare(self, prepare: Callable[[Subject], Prepared]) -> None:
        subject = Subject(self.network.model, self.anatomy, self.network.run, self.data.batches, self.progress)
        with torch.no_grad():
            prepared = prepare(subject)  # on every rank alike, with all batches
        found = self.team.agree(lambda: prepared)
        self.remarks |= found.remarks
        self.facts |= found.facts
        if found.formats:
            self.method = self.method.model_copy(update={"overrides": {**found.formats, **self.method.overrides}})
            check_formats(self.network.model, self.anatomy, self.method)

    def _fold(self) -> dict[str, str]:
        if self.network.weights is None:
            return fold_batch_norms(self.network.model, lambda: self.network.run(few(self.data.batches[0])))
        norms = [name for name, module in self.network.model.named_modules() if is_batch_norm(module)]
        return dict.fromkeys(norms, "not folded: the model is read block by block")

    def _read(self, batch: Any) -> Anatomy:
        run = partial(self.network.run, batch, whole=False)
        anatomy = without(read_anatomy(self.network.model, run, self.method.overrides), self.method.skip)
        for pattern in (*self.method.overrides, *self.method.activation_overrides):
            matching(pattern, anatomy.layers)
        check_formats(self.network.model, anatomy, self.method)
        return anatomy

    def plan(self, runtime: str | None = None) -> dict[str, Any]:
        """What the run would do, and what a runtime has against it."""
        found = [] if runtime is None else findings(self.network, self.anatomy, self.method, runtime)
        made = make_plan(self.network, self.anatomy, self.method, self.data.batches)
        made |= {"memory_bytes": self.memory(), "original_bytes": self.original_bytes}
        return made | {"runtime": runtime, "findings": [one.to_json() for one in found]}

    def memory(self, spill_budget: int = SPILL_BUDGET) -> int:
        """Bytes that the run takes at most, by estimate, beside Python's and torch's own."""
        batches = len(self.data.batches)
        return memory(self.network, self.anatomy, self.sizes, batches, spill_budget)

    def walk(self, pool: Engine, spill_budget: int) -> None:
        """Quantize unit by unit."""
        self.expected = self.memory(spill_budget)
        known = self.method.sensitivities(self.anatomy.layers, self._gradients(self.progress))
        blocks = walk(
            self.network.model, self.anatomy, self.network.run, self.data.batches, self.method.inputs, spill_budget,
            self._restore, self._finish, self.network.load, self._gradients(), known, self.team,
        )  # fmt: skip
        with self.network.by_hand([unit.name for unit in self.anatomy.units]):
            try:
                self.method.run(blocks, pool)
            finally:
                blocks.close()  # type: ignore[attr-defined]

    def _gradients(self, progress: Progress | None = None) -> Gradients:
        resident = self.network.weights is None
        return Gradients(self.network.model, self.network.run, self.data.batches, None, resident, progress)

    def _restore(self, unit: Unit) -> bool:
        kept = None if self.unfinished is None else self.unfinished.restore(self.network.model, unit)
        if kept is None or self.unfinished is None:
            return False
        self.network.stored(unit.name, self.unfinished.tensors(unit))
        self._take(unit.name, kept["records"], kept["operands"], kept["remarks"])
        return True

    def _finish(self, block: Block) -> None:
        if self.unfinished is not None:
            self.team.agree(partial(self.unfinished.write, block))  # rank 0 alone writes; the others read behind it
            self.network.stored(block.unit.name, self.unfinished.tensors(block.unit))
        for record in block.records:
            logger.info("%s: output error %s in %.2f s", record.name, record.output_error, record.time_s)
        self._take(block.unit.name, block.records, block.operand_records, block.remarks)

    def _take(
        self, unit: str, records: list[LayerRecord], operands: list[dict[str, Any]], remarks: dict[str, str]
    ) -> None:
        self.records += records
        self.operands += operands
        self.remarks |= remarks
        self.done += 1
        if self.progress is not None:
            self.progress(unit, self.done, len(self.anatomy.units))

    def report(self, facts: dict[str, Any], time_s: float) -> dict[str, Any]:
        """The report data of kind `quantize`."""
        weights = sum(record.shape[0] * record.shape[1] for record in self.records)
        stored = sum(record.nbytes for record in self.records)
        state = self.network.model.state_dict().values()
        return {
            "schema": 1,
            "kind": "quantize",
            "model": {
                "name": self.network.name,
                "class": type(self.network.model).__name__,
                "parameters": self.parameters,
                "source": self.network.name if self.network.source is None else str(self.network.source),
            },
            "recipe": resolved(self.recipe),
            "provenance": facts,
            "totals": {
                "parameters": self.parameters,
                "quantized_parameters": weights,
                "bits_per_weight": 8 * stored / weights if weights else 0.0,
                "size_bytes": sum(x.numel() * x.element_size() for x in state),
                "original_bytes": self.original_bytes,
                "time_s": time_s,
                "expected_memory_bytes": self.expected,
                "peak_rss_bytes": peak_rss(),
            },
            "layers": [asdict(record) for record in self.records],
            "operands": self.operands,
            "coverage": coverage(self.network.model, self.anatomy.kept, self.remarks),
            "evaluation": None,
            **self.facts,
        }


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
