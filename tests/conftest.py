"""Every test starts from the same random state; tests of the mathematics run in float64."""

import pytest
import torch

collect_ignore = ["faults.py"]  # a program that runs the tests, not one of them


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Default dtype float64 for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
