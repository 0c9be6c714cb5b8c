"""The search loop: rounds of trials, each asked for with all earlier ones known; it goes on where a run was killed."""

from collections.abc import Callable, Mapping, Sequence

from dither.tuning.space import Point
from dither.tuning.strategy import Strategy
from dither.tuning.trial import Outcome, RunTrials, Task, Trial


def search(
    strategy: Strategy,
    count: int,
    make: Callable[[int, Point], Task],
    run_trials: RunTrials,
    judge: Callable[[Outcome, Point], Trial],
    known: Mapping[int, Trial] | None = None,
    batch: int = 1,
) -> list[Trial]:
    """`count` trials, fewer where the space is exhausted, in the order of their numbers.

    `make` makes the task of a number and point, `run_trials` runs the tasks of a round (at most `batch`), `judge`
    makes a trial of each outcome as it comes. Trials that are `known` by number are not run again, and the others are
    asked for as if they had just been run.
    """
    known, trials = known or {}, list[Trial]()
    while len(trials) < count:
        start = len(trials)
        numbers = range(start, min(start + batch, count))
        found = {number: known[number] for number in numbers if number in known}
        taken = {trial.point for trial in found.values()} | {
            trial.point for number, trial in known.items() if number not in numbers and number >= start
        }
        left = [number for number in numbers if number not in found]
        if left:
            asked = [point for point in strategy.ask(len(numbers) + len(taken)) if point not in taken]
            points = dict(zip(left, asked, strict=False))  # fewer at the end of the space
            found |= _run(points, make, run_trials, judge)
        if not found:
            break
        for number in sorted(found):
            strategy.tell(found[number])
            trials.append(found[number])
        if len(found) < len(numbers):
            break
    return trials


def _run(
    points: Mapping[int, Point],
    make: Callable[[int, Point], Task],
    run_trials: RunTrials,
    judge: Callable[[Outcome, Point], Trial],
) -> dict[int, Trial]:
    tasks: Sequence[Task] = [make(number, point) for number, point in points.items()]
    trials = {}
    for outcome in run_trials(tasks):
        trials[outcome.number] = judge(outcome, points[outcome.number])
    lost = sorted(set(points) - set(trials))
    if lost:
        raise RuntimeError(f"trials {lost} were handed out and did not come back")
    return trials
