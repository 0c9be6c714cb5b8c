"""A search that was interrupted goes on as if it had not been: no trial is lost, none is run twice."""

from collections.abc import Callable, Sequence
from itertools import islice

import pytest
from tests.tuning.conftest import judged, measured, task

from dither.tuning import make_strategy
from dither.tuning.loop import search
from dither.tuning.space import Space
from dither.tuning.trial import Outcome, Task, Trial

Play = Callable[..., list[Trial]]


@pytest.mark.parametrize("name", ["random", "genetic", "grid"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kept", [1, 7, 12, 13])
def test_going_on_gives_the_trials_of_a_whole_run(name: str, batch: int, kept: int, play: Play) -> None:
    whole = play(name, seed=2, count=22, batch=batch)
    known = {trial.number: trial for trial in whole[:kept]}
    assert play(name, seed=2, count=22, batch=batch, known=known) == whole


def test_trials_of_a_round_that_came_back_out_of_order_are_kept(play: Play) -> None:
    whole = play("random", seed=2, count=20, batch=4)
    known = {trial.number: trial for trial in whole if trial.number not in (9, 8, 14)}
    assert play("random", seed=2, count=20, batch=4, known=known) == whole


def test_more_trials_can_be_asked_for_later(play: Play) -> None:
    few = play("genetic", seed=1, count=14, batch=4)
    assert play("genetic", seed=1, count=30, batch=4, known=dict(enumerate(few)))[:14] == few


def test_known_trials_are_not_run_again_and_outcomes_may_come_in_any_order(space: Space, play: Play) -> None:
    handed: list[int] = []

    def run(tasks: Sequence[Task]) -> list[Outcome]:
        handed.extend(one.number for one in tasks)
        return measured(list(tasks))[::-1]

    whole = play("random", count=10, batch=5)
    known = dict(enumerate(islice(whole, 7)))
    found = search(
        make_strategy("random", space), 10, task, lambda tasks: iter(run(tasks)), judged, known=known, batch=5
    )
    assert handed == [7, 8, 9]
    assert found == whole


def test_a_known_trial_that_the_strategy_would_not_have_asked_for_is_believed(play: Play, space: Space) -> None:
    strange = Trial(0, space.points[50], 7.0)
    trials = play("grid", count=96, known={0: strange})
    assert trials[0] == strange
    assert len({trial.point for trial in trials}) == 96


def test_a_task_that_does_not_come_back_is_an_error(space: Space) -> None:
    with pytest.raises(RuntimeError, match=r"trials \[1\] were handed out"):
        search(make_strategy("grid", space), 2, task, lambda tasks: iter(measured(list(tasks)[:1])), judged, batch=2)
