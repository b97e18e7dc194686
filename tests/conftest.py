"""Every test starts from the same random state; tests of the mathematics run in float64."""

import os

import pytest
import torch

collect_ignore = ["faults.py", "mutants.py", "conftest.py"]  # no tests: programs that run them, and this


def pytest_configure(config):
    """Tests that run side by side (`pytest -n auto`) take one thread each, and so do the programs that they start."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread():
    """A test's own training on one thread: its models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
