"""The interpolants that are recommended for populations, and the recipe."""

import pytest
import torch

from cflow import ArgumentError
from cflow.populations import Arcs, Snapshots, fit, recipe, wasserstein
from cflow.populations.matching import spline, straight

TIMES = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)


@pytest.fixture
def chains():
    return torch.randn(3, 30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at(arcs, x, part):
    return arcs(x, TIMES, torch.full((2, 30), part, dtype=torch.float64))


def test_arcs_pass_through_the_members_and_move_as_they_say(chains) -> None:
    arcs = Arcs(bend=0.4, pull=0.6, neighbours=5)
    torch.testing.assert_close(at(arcs, chains, 0.0)[0], chains[:-1])
    torch.testing.assert_close(at(arcs, chains, 1.0)[0], chains[1:])
    step = 1e-6
    later, earlier = (at(arcs, chains, 0.3 + sign * step)[0] for sign in (1, -1))
    change = (later - earlier) / (2 * step * TIMES.diff()[:, None, None])
    torch.testing.assert_close(at(arcs, chains, 0.3)[1], change, rtol=1e-6, atol=1e-6)


def test_arcs_lie_between_lines_splines_and_members(chains) -> None:
    half = torch.full((2, 30), 0.5, dtype=torch.float64)
    line, curve = straight(chains, TIMES, half)[0], spline(chains, TIMES, half)[0]
    torch.testing.assert_close(at(Arcs(bend=0.0, pull=0.0), chains, 0.5)[0], line)
    torch.testing.assert_close(at(Arcs(bend=0.25, pull=0.0), chains, 0.5)[0], line + 0.25 * (curve - line))
    members = chains.flatten(0, 1)
    nearest = torch.cdist(line.flatten(0, 1), members).argmin(1)
    torch.testing.assert_close(
        at(Arcs(bend=0.0, pull=1.0, neighbours=1), chains, 0.5)[0].flatten(0, 1), members[nearest]
    )
    everyone = at(Arcs(bend=0.25, pull=1.0, neighbours=1000), chains, 0.5)[0]
    torch.testing.assert_close(everyone, members.mean(0).expand_as(everyone))


def test_a_recipe_moves_a_population() -> None:
    torch.manual_seed(0)
    early = torch.randn(200, 3)
    late = early + torch.tensor([1.5, 0.0, 0.0])
    flow, settings = recipe(3)
    fit(flow, Snapshots([early, late], [0.0, 1.0]), **settings | {"steps": 60, "batch_size": 64})
    with torch.no_grad():
        arrived = flow(early, t=(0.0, 1.0))
    assert wasserstein(arrived, late) < 0.4 < wasserstein(early, late)


@pytest.mark.parametrize("bad", [{"bend": -1.0}, {"pull": -0.1}, {"neighbours": 0}])
def test_bad_arcs(bad) -> None:
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        Arcs(**bad)


def test_a_recipe_needs_a_dimension() -> None:
    with pytest.raises(ArgumentError, match="dim"):
        recipe(0)
