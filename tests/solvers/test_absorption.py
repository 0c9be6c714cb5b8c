"""The closed form by which channels that are left stand in for damaged ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.solvers.absorption import Filters, absorbed, absorption, selection


def drawn(c: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(c, n, generator=generator).double(), torch.randn(c, generator=generator).double()


def loss(s: Tensor, rows: Tensor, t: Tensor, left: Tensor, left_t: Tensor, prior: Tensor, a: float, b: float) -> Tensor:
    """The sum of l_j over channels, written out."""
    return (rows - s @ left).square().sum() + a * (t - s @ left_t).square().sum() + b * (s - prior).square().sum()


@settings(max_examples=15, deadline=None)
@given(
    c=st.integers(2, 7), n=st.integers(1, 9), seed=st.integers(0, 99), identity=st.booleans(), relative=st.booleans()
)
def test_the_closed_form_is_the_minimum(c: int, n: int, seed: int, identity: bool, relative: bool) -> None:
    rows, t = drawn(c, n, seed)
    kept = torch.arange(0, c, 2)
    left, left_t = rows[kept].mul(4).round() / 4, t[kept]
    a, b = 0.3, 0.2
    found = absorption(Filters.of(rows, t, left, left_t), kept, a, b, relative, identity)
    prior = selection(kept, c) if identity else torch.zeros(c, len(kept)).double()
    ridge = b * float(left.square().sum(dim=1).mean()) if relative else b
    s = found.clone().requires_grad_(True)
    with torch.enable_grad():
        value = loss(s, rows, t, left, left_t, prior, a, ridge)
        value.backward()  # type: ignore[no-untyped-call]
    assert s.grad is not None
    torch.testing.assert_close(s.grad, torch.zeros_like(s.grad), rtol=0, atol=1e-9)
    for step in (1e-2, -1e-2):
        assert float(loss(found + step, rows, t, left, left_t, prior, a, ridge)) > float(value.detach())


@pytest.mark.parametrize("identity", [True, False])
def test_nothing_lost_means_that_every_channel_stands_for_itself(identity: bool) -> None:
    rows, t = drawn(4, 9, 0)
    kept = torch.arange(4)
    ridge = 0.5 if identity else 0.0
    found = absorption(Filters.of(rows, t, rows, t), kept, 0.01, ridge, False, identity)
    torch.testing.assert_close(found, torch.eye(4).double(), rtol=0, atol=1e-10)
    weight = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(absorbed(weight, found), weight)


def test_a_channel_that_is_a_sum_of_others_is_absorbed_without_loss() -> None:
    rows, t = drawn(4, 9, 0)
    rows[3], t[3] = rows[0] - 2 * rows[1], t[0] - 2 * t[1]
    kept = torch.tensor([0, 1, 2])
    found = absorption(Filters.of(rows, t, rows[kept], t[kept]), kept, 0.01, 1e-9, False, False)
    torch.testing.assert_close(found[3], torch.tensor([1.0, -2.0, 0.0]).double(), rtol=0, atol=1e-6)
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(2)).double()
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).double()
    before = (x @ rows.T + t) @ weight.T
    after = (x @ rows[kept].T + t[kept]) @ absorbed(weight, found).T
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_composed_filters_are_those_written_out() -> None:
    (first, t), (second, u) = drawn(5, 6, 0), drawn(5, 9, 1)
    kept = torch.tensor([0, 2, 3])
    left, last = first[kept].round(decimals=1), second[kept].round(decimals=1)
    found = Filters.of(second, u, last, u[kept]).behind(Filters.of(first, t, left, t[kept]))
    whole = torch.einsum("ci,ck->cik", first, second).flatten(1)
    part = torch.einsum("ci,ck->cik", left, last).flatten(1)
    expected = Filters.of(whole, u, part, u[kept])
    for name in ("cross", "left", "offsets", "left_offsets"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
