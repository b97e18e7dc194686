"""The page of promises: every test that it names is there; and those that stand nowhere else."""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from cases import Users, rk4
from torch.utils.data import DataLoader

import cflow
from cflow import IntegrationError, PotentialFlow, Schedule, Solver

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| (?!promise )", line)]


def functions(file: str) -> set[str]:
    return {
        d.name for d in ast.parse((TESTS / file).read_text(encoding="utf-8")).body if isinstance(d, ast.FunctionDef)
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_every_promise_names_tests_that_are_there(row):
    *_, held, _ = row.split("|")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", held)
    assert named
    assert [f"{file}::{test}" for file, test in named if test not in functions(file)] == []


def test_every_section_says_what_is_not_promised():
    sections = PAGE.split("\n## ")[1:]
    assert len(sections) == 8
    assert all("\nNot promised: " in section for section in sections)


class Bursting(Users):
    """Blows up where z0 is large."""

    def forward(self, z, t):
        return super().forward(z, t) + (z**4).sum(-1, keepdim=True) * (z.norm(dim=-1, keepdim=True) > 50)


def test_a_flow_is_as_it_was_after_failures():
    z0 = torch.randn(3, 3)
    for solver in rk4(), rk4("adjoint"), Solver("dopri5"), Solver("dopri5", gradient="adjoint"):
        flow = PotentialFlow(Bursting(), solver=solver)
        state = copy.deepcopy(flow.state_dict())
        before = flow.solve(z0, Schedule([0.0, 1.0, 2.0], [0, 1]), (0.0, 2.0), log_density=True)
        for _ in range(3):
            with pytest.raises(IntegrationError):
                flow(100 + z0, 0, (0.0, 1.0))
            with pytest.raises(cflow.ArgumentError):
                flow(z0, 7, (0.0, 1.0))
        after = flow.solve(z0, Schedule([0.0, 1.0, 2.0], [0, 1]), (0.0, 2.0), log_density=True)
        assert torch.equal(after.z, before.z)
        assert torch.equal(after.log_density_change, before.log_density_change)
        assert (after.nfe, after.steps) == (before.nfe, before.steps)
        assert all(torch.equal(state[name], x) for name, x in flow.state_dict().items())
        assert all(p.grad is None for p in flow.parameters())


class Moved(torch.utils.data.Dataset):
    """States that a flow has moved, by whoever reads them."""

    def __init__(self, flow: PotentialFlow, starts: torch.Tensor) -> None:
        self.flow, self.starts = flow, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.flow(self.starts[index : index + 1], index % 2, (0.0, 1.0))[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("solver", [rk4(), Solver("dopri5")], ids=["rk4", "dopri5"])
def test_workers_that_are_forked_solve(solver):
    """After solves and gradients in the process from which they are forked."""
    flow, z0 = PotentialFlow(cflow.MLPPotential(3, 2), solver=solver), torch.randn(8, 3)
    flow(z0, 0, (0.0, 1.0)).sum().backward()
    moved = Moved(flow, z0)
    loader = DataLoader(moved, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), torch.stack([moved[i] for i in range(8)]))
