"""Memory is that of the work which is measured."""

import pytest
import torch

from dither.evaluation.peak import peak_memory


def test_memory_is_measured_around_the_work_alone() -> None:
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        torch.ones(50_000_000).sum()
    if small.nbytes is None or large.nbytes is None:
        pytest.skip("the system does not tell")
    assert large.nbytes - small.nbytes > 150_000_000
