"""Objectives lower a cost that is what was lost, and limits are read as people write them."""

import math

import pytest

from dither.errors import InputError
from dither.tuning.objective import Limit, Objective, read_limits

FULL = {"top1": 0.9, "perplexity": 20.0, "size_bytes": 8e6}


@pytest.mark.parametrize(("name", "better", "worse"), [
    ("accuracy", {"top1": 0.8}, {"top1": 0.7}),
    ("perplexity", {"perplexity": 21.0}, {"perplexity": 30.0}),
    ("kl", {"kl": 0.0}, {"kl": 0.2}),
])  # fmt: skip
def test_a_worse_figure_costs_more_and_full_precision_costs_nothing(
    name: str, better: dict[str, float], worse: dict[str, float]
) -> None:
    aim = Objective(name)
    assert aim.cost(better, FULL) < aim.cost(worse, FULL)  # type: ignore[operator]
    assert aim.cost({**FULL, "kl": 0.0}, FULL) == pytest.approx(0.0)


def test_a_figure_that_is_absent_or_not_finite_has_no_cost() -> None:
    assert Objective("kl").cost({"kl": None}, FULL) is None
    assert Objective("perplexity").cost({"perplexity": math.inf}, FULL) is None


def test_limits_are_broken_by_a_share_of_their_bound() -> None:
    aim = Objective("kl", read_limits(["size=2MB", "accuracy=80%"]))
    assert aim.violation({"size_bytes": 2e6, "top1": 0.8}) == 0
    assert aim.violation({"size_bytes": 3e6, "top1": 0.6}) == pytest.approx(0.5 + 0.25)
    assert aim.violation({"top1": 0.9}) == math.inf


@pytest.mark.parametrize(("text", "limit"), [
    ("size=20MB", Limit("size", 2e7)), ("size=1.5 GiB", Limit("size", 1.5 * 2**30)),
    ("size=4096", Limit("size", 4096.0)),
    ("accuracy=0.85", Limit("accuracy", 0.85)), ("accuracy=85%", Limit("accuracy", 0.85)),
    ("perplexity=20", Limit("perplexity", 20.0)), ("kl=1e-2", Limit("kl", 0.01)),
])  # fmt: skip
def test_limits_are_read_with_their_units(text: str, limit: Limit) -> None:
    (found,) = read_limits([text])
    assert (found.name, found.bound) == (limit.name, pytest.approx(limit.bound))


@pytest.mark.parametrize(("texts", "message"), [
    (["size"], "such as size=20MB"), (["size=big"], "such as size=20MB"), (["accuracy=1.2"], "accuracy=0.85"),
    (["siez=2MB"], "did you mean 'size'"), (["kl=0"], "kl=0.1"), (["size=1MB", "size=2MB"], "given twice"),
    (["perplexity=20MB"], "perplexity=20"), (["size=1.2.3MB"], "size=20MB"),
])  # fmt: skip
def test_limits_that_mean_nothing_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_limits(texts)


def test_objectives_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        Objective("acuracy")
    with pytest.raises(InputError, match="size needs a limit of quality"):
        Objective("size", read_limits(["size=2MB"]))
    assert Objective("size", read_limits(["kl=0.1"])).cost({"size_bytes": 4e6}, FULL) == pytest.approx(0.5)


def test_what_the_data_do_not_give_is_refused() -> None:
    with pytest.raises(InputError, match="give no perplexity, only accuracy, size"):
        Objective("perplexity").check({"top1": 0.9, "size_bytes": 1.0, "kl": None})
    with pytest.raises(InputError, match="give no kl"):
        Objective("accuracy", read_limits(["kl=1"])).check({"top1": 0.9})


def test_equal_costs_are_told_apart_by_divergence_or_by_size() -> None:
    assert Objective("accuracy").tie({"top1": 0.9, "kl": 0.2, "size_bytes": 5.0}) == 0.2
    assert Objective("kl").tie({"kl": 0.2, "size_bytes": 5.0}) == 5.0
    assert Objective("accuracy").tie({"top1": 0.9, "kl": None}) == 0.0
