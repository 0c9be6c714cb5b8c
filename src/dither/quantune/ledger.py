"""Ledger: what turns points into tasks and outcomes into trials, and writes them down at once."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dither.quantune.problem import Problem
from dither.tuning.journal import Journal
from dither.tuning.space import Point
from dither.tuning.trial import Outcome, Task, Trial, best

Progress = Callable[[str, int | float, int], None]  # (what, trials done, in all)


@dataclass
class Ledger:
    """The trials of one search. `done` are those that are known so far, in the order in which they came."""

    problem: Problem
    journal: Journal
    seed: int
    total: int
    progress: Progress | None = None
    done: list[Trial] = field(default_factory=list)

    def task(self, number: int, point: Point) -> Task:
        """The task of a point."""
        configuration = self.problem.space.configuration(point)
        fields, samples = self.problem.choices.fields(configuration), int(configuration["samples"])
        return Task(number, configuration, str(configuration["method"]), fields, samples, self.seed)

    def judge(self, outcome: Outcome, point: Point) -> Trial:
        """Write an outcome down."""
        record = {"number": outcome.number, "configuration": self.problem.space.configuration(point), **asdict(outcome)}
        trial = self.trial(record)
        self.journal.append(record)
        self.follow(trial)
        return trial

    def known(self) -> dict[int, Trial]:
        """The trials that were written down before."""
        trials = {number: self.trial(record) for number, record in self.journal.records.items()}
        for trial in trials.values():
            self.follow(trial)
        return trials

    def trial(self, record: Mapping[str, Any]) -> Trial:
        """A trial from what was written of it."""
        figures = record["figures"]
        cost = None if record["error"] else self.problem.aim.cost(figures, self.problem.reference)
        point = self.problem.space.point(record["configuration"])
        if cost is None:
            return Trial(int(record["number"]), point, None)
        aim = self.problem.aim
        return Trial(int(record["number"]), point, cost, aim.violation(figures), aim.tie(figures))

    def follow(self, trial: Trial) -> None:
        """Say how far the search is."""
        self.done.append(trial)
        if self.progress is not None:
            self.progress(self.standing(), len(self.done), self.total)

    def standing(self) -> str:
        """The best so far in words."""
        leader = best(self.done)
        if leader is None:
            return "none kept the limits yet"
        figure = self.journal.records[leader.number]["figures"][self.problem.aim.quantity.figure]
        return f"best {figure:.4g} by {leader.point[0]}"

    def row(self, trial: Trial) -> dict[str, Any]:
        """What the report says of a trial."""
        return {
            **self.journal.records[trial.number],
            "cost": trial.cost,
            "violation": trial.violation,
            "tie": trial.tie,
        }
